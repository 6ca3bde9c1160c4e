# `make demo` and `make test` are all that a newcomer types. Each does its own set-up.
PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
JOBS        ?= logical
BIN         := $(VENV)/bin
STAMP       := $(VENV)/.installed
PIP         := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check

.PHONY: demo test test-lowest check setup clean lock lock-lowest

setup: $(STAMP)

# torch is installed first and by its exact version: a bare `torch` may bring gigabytes of CUDA libraries. Python
# compiles a module on its first import, so that the many modules that are never imported cost nothing.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, found {v[0]}.{v[1]}; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' $(CONSTRAINTS))"
	$(PIP) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

demo: $(STAMP)
	mkdir -p demo
	cp examples/demo/study.yaml demo/study.yaml
	OMP_NUM_THREADS=1 $(BIN)/merge-search run demo/study.yaml
	rm -rf demo/best
	$(BIN)/merge-search export demo/study.yaml demo/best

# One worker per core, at most four, each with one thread. JOBS=0 runs every test in one process.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 4 --dist worksteal

# The suite with the lowest versions that pyproject.toml allows, in an environment of its own.
test-lowest:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

# .pre-commit-config.yaml runs the same four commands.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Write constraints.txt: the exact version of everything that is installed and tested here.
lock: $(STAMP)
	$(BIN)/python -m pip list --format=freeze --exclude-editable --exclude pip | sed 's/+cpu$$//' > constraints.txt

# Write constraints-lowest.txt: every direct dependency at its lower bound, the others at their newest. The CUDA
# libraries of the torch builds on PyPI are left out, so that the file also fits a build for CPUs.
lock-lowest: $(STAMP)
	$(PIP) uv
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --python-version 3.11 --extra dev --no-header --no-annotate pyproject.toml \
	    | grep -v -E '^(nvidia-|triton==)' > constraints-lowest.txt

clean:
	rm -rf $(VENV) .venv-lowest demo *.egg-info .pytest_cache .mypy_cache .ruff_cache
