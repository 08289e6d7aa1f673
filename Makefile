# Everything happens inside .venv; nothing is installed anywhere else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Where experiments keep their runs: outside the checkout, on a disk with room.
EXPERIMENTS ?= ../greedy-experiments

# With the installed package, not the folder `greedy/`; benchmarks use each other.
BENCHMARK := PYTHONSAFEPATH=1 PYTHONPATH=benchmarks $(BIN)/python benchmarks

.PHONY: install demo test lint types docs wheel experiments gpu clean

install: $(VENV)/.installed

# Train the small network of recipe `demo`, from nothing to its test error.
demo: $(VENV)/.installed
	$(BIN)/greedy train --recipe demo

# Lint, type check and test, all against the wheel that a user would install. Examples and the long
# forms of kills, resumes and compiling are marked slow: with an empty MARKS they run too, as in `.ci/run`.
MARKS ?= not slow
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
test: lint types
	PYTHONSAFEPATH=1 $(BIN)/python -m pytest $(WORKERS) -m "$(MARKS)" $(PYTEST_OPTIONS)

lint: $(VENV)/.wheel
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Of the installed package, from outside the checkout: there `cache/` is `greedy.cache`. Its rooms
# import from those below them alone, and its types agree.
types: $(VENV)/.wheel
	cd $(VENV) && bin/lint-imports --no-cache ../pyproject.toml
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml --cache-dir .mypy_cache -p greedy
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml --cache-dir .mypy_cache ../benchmarks/*.py

# The documentation, as a site in build/site. Warnings are errors; the variable silences what the
# theme has to say about its own future.
docs: $(VENV)/.wheel
	PYTHONSAFEPATH=1 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

SOURCES := pyproject.toml setup.py $(shell find greedy cache cli -name '*.py' -o -name '*.toml' -o -name '*.gz' -o -name 'page.*')

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	rm -rf build
	$(BIN)/python -m pip install .
	touch $@

$(VENV)/.wheel: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install ".[dev]"
	rm -rf dist build
	$(BIN)/python -m build --wheel --outdir dist
	$(BIN)/python -m pip install --force-reinstall --no-deps dist/*.whl
	touch $@ $(VENV)/.installed

wheel: $(VENV)/.wheel

# All pending experiments of docs/experiments.toml: they take days, and the same command resumes.
experiments: $(VENV)/.installed
	$(BENCHMARK)/experiments.py --to $(EXPERIMENTS)

# What only a GPU can show, in about fifteen minutes; the figures belong in docs/results.md.
gpu: $(VENV)/.wheel
	$(BENCHMARK)/gpu.py --to $(EXPERIMENTS)/gpu

clean:
	rm -rf build dist *.egg-info
