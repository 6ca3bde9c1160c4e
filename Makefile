# Two commands are all that a newcomer types: `make demo` and `make test`. Each does its own set-up.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= logical
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test check setup clean lock

setup: $(STAMP)

# torch first and by its exact version: a bare `torch` may bring gigabytes of CUDA libraries. Modules are compiled when
# they are imported: most never are.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, found {v[0]}.{v[1]}; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	mkdir -p demo
	cp examples/demo/study.yaml demo/study.yaml
	OMP_NUM_THREADS=1 $(BIN)/merge-search run demo/study.yaml
	rm -rf demo/best
	$(BIN)/merge-search export demo/study.yaml demo/best

# One worker per core, four at most, each on one thread; JOBS=0 runs all in one process.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 4 --dist worksteal

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Exact versions of everything, as installed and tested here.
lock: $(STAMP)
	$(BIN)/python -m pip list --format=freeze --exclude-editable --exclude pip | sed 's/+cpu$$//' > constraints.txt

clean:
	rm -rf $(VENV) demo *.egg-info .pytest_cache .mypy_cache .ruff_cache
