# Every target works on a fresh clone: it makes its own virtual environment in .venv first.
#   make setup TORCH="torch==2.13.0 --index-url URL"   another build of torch, e.g. one for a CUDA version
#   make test  PYTEST="-k history_topk"                a part of the tests
#   make test  JOBS=8                                  files of tests at once, each on one core; some GB of memory each
#   make demo  DEMO="--shots 1024 --k 10"              a larger demo
# `make gpu` alone can do without: a machine's own Python with torch will do.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
PYTEST ?=
JOBS   ?= 2
DEMO   ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.rellax-installed

.PHONY: help setup demo test lint bench gpu kernels docs clean

help:
	@echo "make setup | demo | test | lint | bench | gpu | kernels | docs | clean"

setup: $(STAMP)

# torch goes first and alone: a range in another package's requirements would pick another build of it.
$(STAMP): pyproject.toml CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h csrc/kernels/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[ctr,dev,docs,bench]"
	touch $(STAMP)

demo: setup
	$(BIN)/rellax demo $(DEMO)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/lint-imports

bench: setup
	$(BIN)/python -m pytest benchmarks/bench_*.py --benchmark-only --benchmark-columns=median,iqr $(PYTEST)

# Kernels right, and how fast, on this machine's GPU. Takes .venv where it is, else a $(PYTHON) that has torch.
#   make gpu DRY=1           tiny inputs on the CPU: does the script itself work?
#   make gpu ONLY=sweep,step some sections, the results of the others are kept
#   make gpu TUNE=1          the fastest configuration of each kernel beside the present one
gpu:
	test -x $(BIN)/python || $(PYTHON) -c "import torch" 2>/dev/null || $(MAKE) setup
	"$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON))" -m benchmarks.gpu $(if $(DRY),--dry) \
		$(if $(ONLY)$(TUNE),--only $(or $(ONLY),tune)) $(if $(OUT),--out $(OUT)) $(if $(BUDGET),--budget $(BUDGET))

# What every Triton kernel compiles to, for GPUs that need not be here (minutes).
kernels: setup
	env -u TRITON_INTERPRET $(BIN)/python -m rellax.testing.aot table docs/kernels.md

# The site, in build/site: needs no network, and warnings are errors.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache $(STAMP)
