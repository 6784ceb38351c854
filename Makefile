# `make help` lists the targets. Everything runs in .venv, which `make setup` fills from requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo train test test-full test-gpu test-slurm test-slurm-full soak lint format bench bench-kernels tune

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## create .venv and install the pinned requirements (no compiler, no GPU needed)

# torch goes first and alone, without a hash: its builds for CPUs have the version of requirements.txt and other hashes
# than PyPI's, and bring no CUDA. Everything else is what requirements.lock has, hash by hash. deepspeed (and antlr4,
# which hydra needs) are source packages: without build isolation they see that torch, and with DS_BUILD_OPS=0 they
# compile nothing.
$(VENV)/.ready: requirements.txt requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "megatron_tn needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' requirements.txt) setuptools wheel
	awk '/^[a-z0-9]/ {keep = !/^(torch|setuptools|nvidia-|cuda-)/} keep' requirements.lock >$(VENV)/without_torch.lock
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation --no-deps --require-hashes -r $(VENV)/without_torch.lock
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

demo: setup ## raw text -> cleaned shards -> trained, resumed and sampled model, in runs/demo
	$(BIN)/python -m launch.demo

train: setup ## train on this machine: make train ARGS="model=demo run_dir=runs/mine ..."
	launch/local.sh $(ARGS)

# worksteal gives a worker tests that stand together, so that a file's fixtures are made once and not by each worker.
test: setup ## every CPU test (of many combinations of parameters a covering subset)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=25 -m "not gpu and not slurm and not full"

test-full: setup ## every CPU test, with all combinations of parameters
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not slurm"

test-gpu: setup ## tests that need a CUDA device
	$(BIN)/python -m pytest -n 5 --dist worksteal -m gpu

bench: bench-kernels ## every benchmark

bench-kernels: setup ## every kernel: correctness, then time against the memory's floor and against peers
	$(BIN)/python -m kernels.bench --output runs/kernels

tune: setup ## time the candidate tiles of lightning attention on this GPU (the table is kernels/lightning/tiles.py)
	$(BIN)/python -m kernels.bench.tune

test-slurm: setup ## training under a real SLURM on this machine (root; installs Debian's slurm if it is missing)
	$(BIN)/python -m pytest -m "slurm and not full"

test-slurm-full: setup ## the same with every fault, a job each
	$(BIN)/python -m pytest -m slurm

soak: setup ## train while faults come at random, then compare: make soak ARGS="minutes=60 mtbf_s=120 seed=1"
	$(BIN)/python -m launch.soak $(ARGS)

lint: setup ## style, import order, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## rewrite the sources in the project's style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
