# make help lists the targets. Everything is installed into $(VENV): an active virtual environment, or .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= python3
VENV ?= $(or $(VIRTUAL_ENV),.venv)
PY := $(VENV)/bin/python
# Passed on to the program: make test ARGS="-k embedding", make demo ARGS="--model DIR".
ARGS ?=

# What an installation depends on. An editable install sees changes of Python files by itself.
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc kernels -type f 2>/dev/null | LC_ALL=C sort)
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | LC_ALL=C sort)

DEMO := $(VENV)/.lissom-demo
DEV := $(VENV)/.lissom-dev

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "lissom needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(DEMO): $(SOURCES) | $(PY)
	$(PY) -m pip install -c constraints.txt -e '.[demo]'
	@touch $@

# One installation for test, lint and bench, so that the extension is built once.
$(DEV): $(SOURCES) | $(PY)
	$(PY) -m pip install -c constraints.txt -e '.[test,lint]'
	@touch $@ $(DEMO)

.PHONY: help demo test lint format bench gpu gpu-check gpu-test gpu-sanitize gpu-bench clean

demo: $(if $(wildcard $(DEV)),$(DEV),$(DEMO)) ## compress a real pretrained model and show the win
	$(VENV)/bin/lissom demo $(ARGS)

test: $(DEV) ## run the tests
	$(PY) -m pytest $(ARGS)

lint: $(DEV) ## ruff, mypy and clang-format; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(DEV) ## rewrite the sources as lint wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

bench: $(DEV) ## run the benchmarks; writes bench/results (ARGS=--quick: a smoke run)
	$(PY) -m bench $(ARGS)

# Where $(PYTHON) has torch with CUDA already, in a container without a network say, its packages are used as
# they are, from an environment of our own; otherwise everything is installed into $(VENV).
SEES_GPU := import sys, torch, triton; sys.exit(not torch.cuda.is_available())
NEEDS_GPU := import sys, torch; \
  sys.exit(None if torch.cuda.is_available() else f"no GPU was found by torch {torch.__version__}")
GPU_VENV := .venv-gpu
GPU_PY = $$(test -e $(GPU_VENV)/.lissom && echo $(GPU_VENV)/bin/python || echo $(PY))

$(GPU_VENV)/.lissom: $(SOURCES)
	$(PYTHON) -m venv --clear --without-pip $(GPU_VENV)
	$(PYTHON) -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
	  > $$($(GPU_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/given.pth
	$(PYTHON) -m pip --python $(GPU_VENV)/bin/python install --no-index --no-build-isolation --no-deps -e .
	@touch $@

gpu:
	@if $(PYTHON) -c '$(SEES_GPU)' 2>/dev/null; then $(MAKE) --no-print-directory $(GPU_VENV)/.lissom; \
	else $(MAKE) --no-print-directory $(DEV) gpu-check; fi

gpu-check:
	@$(PY) -c '$(NEEDS_GPU)'

# Most of their time is Triton compiling some 1500 forms of kernels: a process per core, up to fourteen.
GPU_JOBS = $$($(GPU_PY) -c 'import os, xdist; print(f"-n{min(14, os.cpu_count())}")' 2>/dev/null)

gpu-test: gpu ## run the tests of GPU kernels on a GPU
	$(GPU_PY) -m pytest $(GPU_JOBS) -m "gpu or triton or cuda" $(ARGS)

# Without torch's cache every tensor is an allocation of its own, past whose end nothing may be touched.
CUDA_TESTS = $(filter-out %_emulator.py %_compile.py %_loading.py,$(wildcard tests/test_cuda_*.py))

gpu-sanitize: gpu ## run the tests of CUDA C++ kernels under compute-sanitizer
	for tool in memcheck racecheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool \
	  --error-exitcode 1 $(GPU_PY) -m pytest -q -m cuda $(CUDA_TESTS) $(ARGS) || exit 1; done

gpu-bench: gpu ## run the benchmarks on a GPU, in less than ten minutes; writes build/gpu-bench (ARGS="--out DIR")
	$(GPU_PY) -m bench.gpu $(ARGS)

clean: ## remove what was built; the virtual environment stays, and the next make installs again
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .benchmarks $(DEMO) $(DEV) $(GPU_VENV)
	find python tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
