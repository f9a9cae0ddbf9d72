# `make demo` and `make test` build .venv themselves; nothing needs installing by hand but Python.

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-oldest test-gpu lint tables notebook docs clean

VENV := .venv
RUN := JAX_PLATFORMS=cpu $(VENV)/bin/python
# Tests that use the same compiled programs stay in one process, the long ones first; see
# tests/conftest.py.
PYTEST := -m pytest --no-loadscope-reorder

# The oldest JAX that pyproject.toml admits, and what is tried with it.
OLDEST := .venv-oldest
OLDEST_JAX := $(shell sed -n 's/^dependencies = .*"jax>=\([0-9.]*\),.*/\1/p' pyproject.toml)
OLDEST_TESTS := tests/test_import.py tests/test_shardwise.py tests/test_forward_mode.py \
	tests/linen/test_layer_values.py::test_formulas \
	tests/contract/test_sequence.py::test_packed_is_the_definition \
	tests/contract/test_transforms.py::test_shardings_in_types

# `make test-gpu GPU_PYTHON=python3` uses a Python that has JAX for the GPU, pytest and the rest.
GPU_PYTHON := $(VENV)/bin/python

help:
	@echo 'make demo   train a small language model on the CPU (about three minutes), then sample from it'
	@echo 'make test   run the tests on the CPU (about 10 minutes on two cores)'
	@echo 'make test-all  also run the sweeps that are marked slow'
	@echo 'make test-oldest  run a selection with the oldest JAX that is supported, in $(OLDEST)'
	@echo 'make test-gpu  run the tests that need an H100 or H200, on one or two'
	@echo 'make lint   check style, formatting and types'
	@echo 'make tables write the tables of READMEs and docs and draw docs/pictures, from benchmarks/results'
	@echo 'make notebook  run docs/tutorial.ipynb and keep what it prints and draws'
	@echo 'make docs   build the site in _site; open _site/index.html'
	@echo 'make clean  remove the virtual environment and the demo'"'"'s output'
	@echo
	@echo 'All but clean build $(VENV) when it is missing or pyproject.toml has changed.'
	@echo 'PYTHON=/path/to/python chooses the interpreter; it must be 3.12 or newer.'

demo: $(VENV)/installed-examples
	$(RUN) examples/train_lm.py --out runs/demo --overwrite

# Triton's interpreter takes a process of its own, which runs the tests that need it and no others.
INTERPRETED := TRITON_INTERPRET=1 $(RUN) $(PYTEST) -n 2 tests/contract tests/triton

test: $(VENV)/installed-dev
	$(RUN) $(PYTEST) -n 2 -m "not gpu and not slow"
	$(INTERPRETED) -m "not gpu and not slow"

test-all: $(VENV)/installed-dev
	$(RUN) $(PYTEST) -n 2 -m "not gpu"
	$(INTERPRETED) -m "not gpu"

test-oldest: $(OLDEST)/installed
	JAX_PLATFORMS=cpu $(OLDEST)/bin/python $(PYTEST) -n 2 -m "not gpu and not slow" $(OLDEST_TESTS)

# Each process gives its memory back after every program, or fourteen would not fit on one GPU.
test-gpu: $(if $(filter $(VENV)/%,$(GPU_PYTHON)),$(VENV)/installed-dev-gpu)
	XLA_PYTHON_CLIENT_ALLOCATOR=platform $(GPU_PYTHON) $(PYTEST) -n 14 -m gpu

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) -m pyright --pythonpath $(VENV)/bin/python

tables: $(VENV)/installed-dev
	$(RUN) -m benchmarks.tables
	$(RUN) -m benchmarks.plot
	$(RUN) -m benchmarks.drawings

notebook: $(VENV)/installed-dev
	$(RUN) docs/site/notebook.py

# Warnings are errors. Building needs no network; the message that is turned off is advertising.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

clean:
	rm -rf $(VENV) $(OLDEST) runs/demo _site

# One stamp for each extra. An environment that exists is kept and updated.
$(VENV)/installed-%: pyproject.toml
	@$(call BUILD,$(VENV),)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	$(if $(filter dev,$*),@$(call LAUNCHER,$(VENV)))
	@touch $@

# With the newest Python that is supported, where it is there.
$(OLDEST)/installed: pyproject.toml
	@$(call BUILD,$(OLDEST),python3.13 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.13*/bin/python)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]' jax==$(OLDEST_JAX)
	@touch $@

# What launches Triton's kernels is in JAX's CUDA plugin. Without CUDA, which --no-deps leaves out,
# the tests see how they are lowered. There is none but for Linux.
LAUNCHER = if [ "$$(uname)" = Linux ]; then \
	    $(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	        jax-cuda13-plugin==$$($(1)/bin/python -c 'import jaxlib; print(jaxlib.__version__)'); \
	fi

# Builds the environment $(1) if there is none, with the first of the Pythons $(2) that serves.
BUILD = if ! $(1)/bin/python -c '$(CHECK)' 2>/dev/null; then \
	    $(FIND_PYTHON); \
	    echo "Building $(1) with $$python"; \
	    "$$python" -m venv --clear $(1) || exit 1; \
	fi

# A Python serves if it is new enough and can build an environment (Debian splits that off).
CHECK := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))

# Every candidate is run, for a name on PATH can be a pyenv shim that only refuses.
FIND_PYTHON = python=; \
	for candidate in $(2) $(or $(PYTHON),python3 python3.12 python3.13 python3.14 python \
	        "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.*/bin/python); do \
	    if "$$candidate" -c '$(CHECK)' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo 'No Python >= 3.12 with venv and pip$(if $(PYTHON), at $(PYTHON)) was found.' >&2; \
	    echo 'Install one, for example "apt install python3.12 python3.12-venv", "pyenv install 3.12"' >&2; \
	    echo 'or from https://www.python.org/downloads, or name yours: make PYTHON=/path/to/python' >&2; \
	    exit 1; \
	fi
