# `make demo` sets up a fresh machine and serves the embedded model; `make test` sets up and passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# pip compiles to bytecode on one core; this does on all of them, and leaves out what nobody here imports, or few modules of.
BYTECODE := $(BIN)/python -m compileall -qq -j 0 -x '/tests?/|/ray/rllib/|/transformers/models/' $(VENV)/lib
# What a process compiles the next one reads, also where a container's environment says that none shall write it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test run-tests check lint types coverage setup setup-test clean

demo: setup
	exec $(BIN)/octavo serve --quantization ptpc_fp8 --kv-cache-dtype fp8 $(ARGS)

# mypy runs beside the tests, and the tests in two processes (in one where there is a GPU: tests/conftest.py).
test: lint
	$(MAKE) --no-print-directory -j2 types run-tests

run-tests: setup-test
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# Which lines the tests run, as a table and as pages in build/coverage; ARGS chooses tests. It takes longer than `make test`.
coverage: setup-test
	$(BIN)/python -m pytest --cov --cov-report=term --cov-report=html $(ARGS)

check: lint types

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-test
	$(BIN)/mypy

setup: $(VENV)/.setup

setup-test: $(VENV)/.setup-test

# The pins are of the versions that the tests ran with. The stamps are written last, so a broken install is done again. The C
# compiler makes the kernels while Python's bytecode is made.
$(VENV)/.setup: pyproject.toml requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Octavo needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	$(BYTECODE) & $(INSTALL) --no-deps --no-build-isolation -e . && wait
	touch $@

$(VENV)/.setup-test: $(VENV)/.setup requirements-test.txt
	$(INSTALL) -r requirements-test.txt
	-$(BYTECODE)
	touch $@

clean:
	rm -rf $(VENV)
