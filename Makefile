# `make run` and `make test` work on a fresh machine with Python 3.11 or later and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run smoke test test-all faults bench

run: $(VENV)/run-ready
	$(BIN)/python -m experiments.debug_run $(ARGS)

smoke: $(VENV)/run-ready
	$(BIN)/python -m experiments.debug_run --preset smoke $(ARGS)

test-all: ALL = -m ""

test test-all: $(VENV)/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & types=$$!; OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile \
		--no-loadscope-reorder $(ALL) && wait $$types

faults: $(VENV)/test-ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults.py $(ARGS)

bench: $(VENV)/run-ready
	$(BIN)/python -m experiments.benchmark $(ARGS)

# Each stamp is older than its requirements file only before the packages are in.
$(VENV)/run-ready: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	touch $@

$(VENV)/test-ready: requirements-dev.txt $(VENV)/run-ready
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt --constraint constraints.txt
	touch $@
