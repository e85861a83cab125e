PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench results clean

demo: $(VENV)/installed
	$(BIN)/python -m examples.demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .

bench: $(VENV)/installed-bench
	$(BIN)/python -m bench

results: $(VENV)/installed
	$(BIN)/python -m bench.released

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# The stamps keep a second call from installing anything again.
$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@ $(VENV)/installed

$(VENV)/installed-bench: bench/requirements.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet -r bench/requirements.txt
	touch $@

clean:
	rm -rf demo_output .mypy_cache .ruff_cache .pytest_cache
