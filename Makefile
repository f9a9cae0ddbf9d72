# `make demo` and `make test` build .venv themselves; nothing needs installing by hand but Python.

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint tables clean

VENV := .venv
RUN := JAX_PLATFORMS=cpu $(VENV)/bin/python

help:
	@echo 'make demo   train a small language model on the CPU (about three minutes), then sample from it'
	@echo 'make test   run the tests on the CPU (within 20 minutes on two cores)'
	@echo 'make test-all  also run the sweeps that are marked slow'
	@echo 'make lint   check style and formatting'
	@echo 'make tables write the README'"'"'s table of times from benchmarks/results'
	@echo 'make clean  remove the virtual environment and the demo'"'"'s output'
	@echo
	@echo 'All but clean build $(VENV) when it is missing or pyproject.toml has changed.'
	@echo 'PYTHON=/path/to/python chooses the interpreter; it must be 3.12 or newer.'

demo: $(VENV)/installed-examples
	$(RUN) examples/train_lm.py --out runs/demo --overwrite

test: $(VENV)/installed-dev
	$(RUN) -m pytest -n 2 --no-loadscope-reorder -m "not gpu and not slow"

test-all: $(VENV)/installed-dev
	$(RUN) -m pytest -n 2 --no-loadscope-reorder -m "not gpu"

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

tables: $(VENV)/installed-dev
	$(RUN) -m benchmarks.tables

clean:
	rm -rf $(VENV) runs/demo

# One stamp for each extra. An environment that exists is kept and updated.
$(VENV)/installed-%: pyproject.toml
	@if ! $(VENV)/bin/python -c '$(CHECK)' 2>/dev/null; then \
	    $(FIND_PYTHON); \
	    echo "Building $(VENV) with $$python"; \
	    "$$python" -m venv --clear $(VENV) || exit 1; \
	fi
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

# A Python serves if it is new enough and can build an environment (Debian splits that off).
CHECK := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))

# Every candidate is run, for a name on PATH can be a pyenv shim that only refuses.
FIND_PYTHON = python=; \
	for candidate in $(or $(PYTHON),python3 python3.12 python3.13 python3.14 python \
	        "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.*/bin/python); do \
	    if "$$candidate" -c '$(CHECK)' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo 'No Python >= 3.12 with venv and pip$(if $(PYTHON), at $(PYTHON)) was found.' >&2; \
	    echo 'Install one, for example "apt install python3.12 python3.12-venv", "pyenv install 3.12"' >&2; \
	    echo 'or from https://www.python.org/downloads, or name yours: make PYTHON=/path/to/python' >&2; \
	    exit 1; \
	fi
