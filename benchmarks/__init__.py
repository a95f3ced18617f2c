"""One harness, a ``bench_<topic>.py`` per topic, raw rows in ``results/<device>/<topic>.jsonl``; tables are generated."""
