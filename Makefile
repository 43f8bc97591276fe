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

.PHONY: help demo test lint format bench gpu gpu-test gpu-bench clean

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

gpu: $(DEV)
	@$(PY) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	  f"no GPU was found: torch.cuda.is_available() is False (torch {torch.__version__})")'

gpu-test: gpu ## run the tests of GPU kernels on a GPU
	$(PY) -m pytest -m "gpu or triton or cuda" $(ARGS)

gpu-bench: gpu ## run the benchmarks on a GPU, in less than ten minutes (ARGS="--out DIR")
	$(PY) -m bench.gpu $(ARGS)

clean: ## remove what was built; the virtual environment stays, and the next make installs again
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .benchmarks $(DEMO) $(DEV)
	find python tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
