# make demo: set up, then train, test, picture and export RD++ on generated data
# make test: set up, then run the tests; make test-all: those that take minutes too
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all clean

demo: .venv/ready
	$(BIN)/python -W ignore -m anomalib_rdpp.demo

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/ready
	$(BIN)/python -m pytest

# constraints.txt holds the versions that were tested together, so that a new release of a dependency breaks nobody.
.venv/ready: pyproject.toml constraints.txt hatch_build.py $(wildcard startup/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build dist demo_results openvino_cache
