PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
# More workers than this gain nothing, and each takes a gigabyte.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test quick lint bench results constraints clean

demo: $(VENV)/installed
	$(BIN)/python -m examples.demo

test: lint
	$(PYTEST)

# The inner loop: no lint, no slow tests.
quick: $(VENV)/installed-dev
	$(PYTEST) -m "not slow"

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .

bench: $(VENV)/installed-bench
	$(BIN)/python -m bench

results: $(VENV)/installed
	$(BIN)/python -m bench.released

# The versions that CI installs: the newest that pyproject.toml allows, installed into an environment of their own.
constraints:
	$(PYTHON) -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet -e '.[dev,bench]'
	$(VENV)-newest/bin/python -m pip freeze --exclude-editable > constraints.txt
	rm -rf $(VENV)-newest

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# The stamps keep a second call from installing anything again. PIP_CONSTRAINT, which pip reads too, names a file or none.
$(VENV)/installed: pyproject.toml $(PIP_CONSTRAINT) | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml $(PIP_CONSTRAINT) | $(VENV)/bin/python
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/installed

$(VENV)/installed-bench: pyproject.toml $(PIP_CONSTRAINT) | $(VENV)/bin/python
	$(PIP) -e '.[bench]'
	touch $@ $(VENV)/installed

clean:
	rm -rf demo_output build *.egg-info .mypy_cache .ruff_cache .pytest_cache
