"""Models in the file format of llama.cpp, read and written with its own `gguf` library (optional: extra `search`)."""
