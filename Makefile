# Every target sets up what it needs. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help setup demo test lint unit interpret aot bench gpu clean

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup: $(STAMP) ## virtual environment in .venv with everything, extension built
	@$(BIN)/python setup.py -q build_ext --inplace

# With an NVIDIA driver the default (CUDA) build of torch; without, the CPU build, which is gigabytes smaller.
$(STAMP): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	@if command -v nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install -q "torch>=2.11"; \
	else $(BIN)/pip install -q --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "torch==2.13.0+cpu"; fi
	$(BIN)/pip install -q -e ".[dev]"
	@touch $(STAMP)

demo: setup ## the whole mission on the embedded small model: profile, search, prune, distil, export, evaluate
	$(BIN)/jointnas demo

test: lint unit interpret aot ## everything that needs no GPU

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: setup
	$(BIN)/python -m pytest tests --ignore=tests/triton_interpret --ignore=tests/aot --ignore=tests/gpu

# own processes: the interpreter must be switched on before Triton is imported, and must be off to compile
interpret: setup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/triton_interpret

aot: setup
	$(BIN)/python -m pytest -n 2 tests/aot

bench: setup ## benchmarks on this machine, raw rows into benchmarks/results, tables and plots from them
	$(BIN)/jointnas bench all
	$(BIN)/python benchmarks/render.py

gpu: ## on a machine with a GPU: build, correctness, sanitizer, benchmarks, in under 9 minutes; uses $(PYTHON)'s own torch
	$(PYTHON) benchmarks/gpu_run.py

clean: ## remove build products (keeps .venv)
	rm -rf build dist *.egg-info jointnas_kernels/*.so .mypy_cache .ruff_cache
