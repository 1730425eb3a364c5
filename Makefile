# make demo: set up, then train, test, picture and export RD++ on generated data
# make test: set up, then run the tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/ready
	$(BIN)/python -m anomalib_rdpp.demo

test: .venv/ready
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# constraints.txt holds the versions that were tested together, so that a new release of a dependency breaks nobody.
.venv/ready: pyproject.toml constraints.txt hatch_build.py $(wildcard startup/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build dist demo_results
