# make demo: set up, then train, test, picture and export RD++ on generated data
# make test: set up, then run the tests; make test-all: those that take minutes too
# make lint: style and types
# make docs: build the documentation into site/
# make notebooks: run all notebooks quickly; make notebooks QUICK= SAVE=1: as they are, minutes each, and keep the outputs
PYTHON ?= python3
BIN := .venv/bin
QUICK ?= 1
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test test-all lint docs notebooks clean

demo: .venv/ready
	$(BIN)/python -W ignore -m anomalib_rdpp.demo

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses auto --dist loadfile --no-loadscope-reorder --cov

test-all: .venv/ready .venv/docs .venv/notebooks
	$(BIN)/python -m pytest --cov

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m mypy

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: .venv/notebooks
	QUICK=$(QUICK) $(BIN)/jupyter-execute $(if $(SAVE),--inplace) $(wildcard notebooks/*.ipynb)

# constraints.txt holds the versions that were tested together, so that a new release of a dependency breaks nobody.
.venv/ready: pyproject.toml constraints.txt hatch_build.py $(wildcard startup/*)
	$(PYTHON) -m venv .venv
	$(INSTALL) '.[test,edge]'
	touch $@

.venv/docs .venv/notebooks: .venv/%: .venv/ready
	$(INSTALL) '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist site demo_results notebooks/results openvino_cache
