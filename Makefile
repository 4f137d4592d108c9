# make demo, make test and make test-slow start from nothing but Python, make and the package index: the first of them
# builds .venv. PYTHON=python3.12 chooses the interpreter, CONSTRAINTS= installs the newest versions allowed.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# Processes of pytest; a file's tests stay together, since ranks of two files at once starve each other on two cores.
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
PARALLEL = $(if $(filter-out 0 1,$(WORKERS)),-n $(WORKERS) --dist loadfile --no-loadscope-reorder)
GPU_TESTS = $(shell grep -rlE 'mark\.(multi_)?gpu' tests --include='test_*.py')

# One thread per process: the tests start several ranks on few cores.
test test-slow test-gpu: export OMP_NUM_THREADS = 1

.PHONY: help demo test test-slow test-gpu lint format install clean

help:
	@echo "make demo       install, then pretrain, rewire, damage, repair and trace a small model on two CPU ranks"
	@echo "make test       install, then lint, types and the CPU test-suite"
	@echo "make test-slow  what needs root, a browser, a compiler or more time"
	@echo "make test-gpu   the tests that need a GPU, with this machine's own $(PYTHON) and torch, without installing"
	@echo "make lint       ruff and mypy;  make format  ruff's formatter;  make clean  remove all that make built"

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) scripts/install.py $(VENV) $(CONSTRAINTS)

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/farskip demo $(DEMO_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/check_types.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/pytest -m "not slow and not gpu and not multi_gpu" $(PARALLEL) $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/pytest -m "slow and not gpu and not multi_gpu" $(PYTEST_ARGS)

# Only files with such a test are collected: the others may import what that machine does not have.
test-gpu:
	$(if $(GPU_TESTS),,$(error no test is marked gpu))
	$(PYTHON) scripts/link_tree.py
	PYTHONPATH=.link_tree PYTHONSAFEPATH=1 $(PYTHON) -m pytest -m "gpu or multi_gpu" \
		-W ignore::pytest.PytestConfigWarning $(PYTEST_ARGS) $(GPU_TESTS)

clean:
	rm -rf $(VENV) .link_tree build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
