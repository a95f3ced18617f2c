# Every target sets up what it needs. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
STAGE  := .ci/stage build/test
SETUP  := .ci/stage build/setup
PYTEST := $(BIN)/python -m pytest
# of tests/conftest.py: what `make test` has minutes for
CASES  := sample
NO_GPU := CUDA_VISIBLE_DEVICES=
TORCH_FOR_DIST ?= torch>=2.11
# of the machine with a GPU
GPU_PYTHON ?= python3.12
GPU_TORCH  ?= torch==2.11.0 triton==3.6.0
# where its kernels are compiled ahead; what the commands of a GPU run import
AHEAD      := build/ahead
AHEAD_WITH := "transformers>=5.17" pydantic jsonargparse pytest pytest-timeout hypothesis psutil accelerate peft
# Two processes of one thread each: most tests are too small to share between threads.
TWO    := OMP_NUM_THREADS=1

.PHONY: help setup demo test rest lint types contracts docs examples unit interpret aot bench gpu gpu-1 gpu-2 gpu-package dist-check clean

help:
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup: $(STAMP) ## virtual environment in .venv with everything, extension built
	@$(SETUP) extension sh -c '$(BIN)/python setup.py -q build_ext --inplace && echo "built in build/"'

# With an NVIDIA driver the default (CUDA) build of torch; without, the CPU build, which is gigabytes smaller, where its index
# can be reached.
CPU_INDEX := https://download.pytorch.org/whl/cpu
ifneq ($(shell command -v nvidia-smi),)
TORCH := $(BIN)/pip install "torch>=2.11"
else
TORCH := $(BIN)/pip install --retries 1 --extra-index-url $(CPU_INDEX) "torch==2.13.0+cpu" || $(BIN)/pip install "torch>=2.11"
endif

# Without build isolation, whose temporary paths would have the extension compiled twice.
$(STAMP): pyproject.toml setup.py
	@echo "setting up $(VENV), once, in about 5 minutes"
	@$(SETUP) venv sh -c '$(PYTHON) -m venv $(VENV) && $(BIN)/pip install --upgrade pip && $(BIN)/python --version'
	@$(SETUP) torch sh -c '($(TORCH)) && $(BIN)/python -c "import torch; print(torch.__version__)"'
	@$(SETUP) packages sh -c '$(BIN)/pip install setuptools pybind11 ninja && $(BIN)/pip install --no-build-isolation -e ".[dev]" \
		&& echo "$$($(BIN)/pip list | wc -l) packages, extension"'
	@touch $(STAMP)

demo: setup ## the whole mission on the embedded small model: profile, search, prune, distil, export, evaluate
	@$(BIN)/jointnas demo

test: lint types contracts docs examples unit interpret aot ## what needs no GPU: of large matrices a sample, no slow tests

rest: setup ## the cases that `make test` leaves out
	@$(MAKE) --no-print-directory examples unit interpret aot CASES=rest

lint: setup ## ruff
	@$(STAGE) lint $(BIN)/ruff check .

types: setup ## mypy, strict
	@$(STAGE) types $(BIN)/mypy

contracts: setup ## layers, circles, private names, docstrings
	@$(STAGE) contracts $(PYTEST) tests/contracts

docs: setup ## the API site, into site/
	@$(STAGE) docs .ci/site $(BIN)

examples: setup ## the scripts of examples/
	@$(NO_GPU) $(TWO) $(STAGE) examples $(PYTEST) --cases $(CASES) -n 2 tests/examples

unit: setup ## everything else under tests/
	@$(NO_GPU) $(TWO) $(STAGE) unit $(PYTEST) --cases $(CASES) -n 2 tests $(addprefix --ignore=tests/,contracts examples triton_interpret aot gpu)

# own processes: the interpreter must be switched on before Triton is imported, and must be off to compile
interpret: setup ## Triton kernels in its interpreter
	@TRITON_INTERPRET=1 $(STAGE) interpret $(PYTEST) --cases $(CASES) -n 2 tests/triton_interpret

aot: setup ## Triton kernels compiled for GPUs that are not there
	@$(STAGE) aot $(PYTEST) --cases $(CASES) -n 2 tests/aot

bench: setup ## benchmarks on this machine, raw rows into benchmarks/results, tables and plots from them
	$(BIN)/jointnas bench all
	$(BIN)/python benchmarks/render.py

# They use $(PYTHON)'s own torch. GPU holds further options, e.g. make gpu-2 GPU=--resume
gpu: ## on a machine with a GPU, in under 9 minutes: the two parts in one
	$(PYTHON) -m benchmarks.gpu_run $(GPU)

gpu-1: ## correctness, in 5 minutes: load and smoke, tests, memory checker, launches of a step
	$(PYTHON) -m benchmarks.gpu_run --part 1 $(GPU)

gpu-2: ## speed, in 8 minutes: GEMMs against peers, kernels, steps, a latency table, decoding, a search
	$(PYTHON) -m benchmarks.gpu_run --part 2 $(GPU)

gpu-package: setup $(AHEAD)/.installed ## what these need not build: the extension for $(GPU_PYTHON), Triton's cache, into build/
	$(BIN)/python -m benchmarks.gpu_package build --python $(GPU_PYTHON) --with pydantic jsonargparse \
		--ahead $(AHEAD)/bin/python

$(AHEAD)/.installed:
	@echo "setting up $(AHEAD): $(GPU_PYTHON), $(GPU_TORCH)"
	@$(SETUP) ahead sh -c '$(GPU_PYTHON) -m venv $(AHEAD) && $(AHEAD)/bin/pip install $(GPU_TORCH) $(AHEAD_WITH)'
	@touch $@

dist-check: ## sdist, wheel of it, installed beside $(TORCH_FOR_DIST) in an empty environment, smoke tests there
	@.ci/dist $(PYTHON) "$(TORCH_FOR_DIST)"

clean: ## remove build products (keeps .venv)
	rm -rf build dist site *.egg-info jointnas_kernels/*.so .mypy_cache .ruff_cache .cache
