"""One harness, a ``bench_<topic>.py`` per topic, raw rows in ``results/<device>``; tables and plots are generated."""
