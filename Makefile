PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: help latency systems test fuzz lint bench gpu clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

latency: $(STAMP) ## print the latency table (ARGS='...' goes to `cachemoe latency`)
	$(BIN)/cachemoe latency $(ARGS)

systems: $(STAMP) ## print the table of eleven systems (ARGS='...' goes to `cachemoe systems`)
	$(BIN)/cachemoe systems $(ARGS)

test: $(STAMP) ## run the test suite, a process a core (ARGS='...' goes to pytest)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

fuzz: $(STAMP) ## damaged and hostile files, for many minutes (FUZZ=20000 examples of each kind)
	CACHEMOE_FUZZ=$(or $(FUZZ),20000) $(BIN)/python -m pytest tests/test_fuzz.py

lint: $(STAMP) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP) ## microbenchmarks of the kernels (ARGS='...' goes to pytest)
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

# On a machine that brings its own PyTorch, `make gpu` runs on that; where there is a .venv, on the .venv.
gpu: GPU_PYTHON = $(shell test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON))
gpu: ## tests, microbenchmarks and tables on a GPU, into one JSON file (ARGS='...' goes to `cachemoe gpu`)
	$(GPU_PYTHON) -m pip install --no-deps --no-build-isolation -e .
	$(GPU_PYTHON) -m cachemoe.benchmarks.cli gpu $(ARGS)

clean: ## remove the environment, build outputs and tool caches
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@
