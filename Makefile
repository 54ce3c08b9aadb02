PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: help latency test lint bench gpu clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

latency: $(STAMP) ## print the latency table (ARGS='...' goes to `cachemoe latency`)
	$(BIN)/cachemoe latency $(ARGS)

test: $(STAMP) ## run the test suite
	$(BIN)/python -m pytest

lint: $(STAMP) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP) ## micro-benchmarks of what decode does in a layer
	$(BIN)/python -m pytest benchmarks --benchmark-only

gpu: ## measurements on a GPU (not yet)
	@echo 'The GPU command is not part of this version yet.' >&2; exit 2

clean: ## remove the environment, build outputs and tool caches
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@
