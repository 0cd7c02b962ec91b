# SPDX-License-Identifier: Apache-2.0
# Two commands matter: `make demo` and `make test`. Both build first, into .venv.

PYTHON ?= python3
VENV   := .venv
SECONDS ?= 1800
RUN    := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(shell find kvmpy -name '*.pyx' -o -name '*.pxd' -o -name '*.h' -o -name '*.c')

.PHONY: demo test lint bench fuzz build clean

demo: build
	$(RUN) examples/demo.py

test: build
	$(RUN) -m pytest $(ARGS)

# ruff and mypy --strict; `make test` compares the stubs with the runtime
lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# Each fuzz target for SECONDS (needs clang with libFuzzer).
fuzz: build
	$(PYTHON) tools/fuzz.py cpu --seconds $(SECONDS)
	$(PYTHON) tools/fuzz.py jit --seconds $(SECONDS)
	$(PYTHON) tools/fuzz.py machine --seconds $(SECONDS)
	$(RUN) tools/fuzz.py virtio --seconds $(SECONDS)
	$(RUN) tools/fuzz.py qcow2 --seconds $(SECONDS)
	$(RUN) tools/fuzz.py network --seconds $(SECONDS)

bench: build
	$(RUN) -m benchmarks $(ARGS)

build: $(VENV)/built

$(VENV)/built: $(VENV)/ready $(SOURCES)
	$(VENV)/bin/pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

# The tools of pyproject.toml's "dev" extra; the editable install comes after them.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/python tools/requirements.py | $(VENV)/bin/pip install --quiet -r /dev/stdin
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find kvmpy -name '*.so' -delete
