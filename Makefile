# Everything runs in .venv, which any target makes by itself: Python 3.11, 3.12 or 3.13 is all that must be there.
# `make PYTHON=/path/to/python3.12 …` chooses the interpreter.

BIN := .venv/bin
SOURCES := cluster coordinator worker tests benchmarks scripts setup.py

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types format proto clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed: pyproject.toml setup.py constraints.txt scripts/install.sh $(wildcard worker/native/src/*)
	@scripts/install.sh .venv --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/installed ## Serve the embedded BLOOM on three workers and stream text from it
	@$(BIN)/cluster demo

test: lint types ## Format, lint, types, contracts, schemas, stubs, then every test
	@scripts/generate_stubs.sh --check
	@$(BIN)/pytest

check: lint types ## The fast part of `make test`: no tests that cross processes
	@$(BIN)/pytest -m "not slow"

lint: .venv/installed ## Format and lint checks, import contracts, schema lint
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/buf lint

types: .venv/installed ## mypy, strict
	@$(BIN)/mypy

format: .venv/installed ## Format and fix what can be fixed
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

proto: .venv/installed ## Generate cluster/rpc/v1 from proto/
	@scripts/generate_stubs.sh

clean: ## Remove environments, caches and build output
	rm -rf .venv .venv-proto build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
