"""RMSNorm in expectation over sizes."""
