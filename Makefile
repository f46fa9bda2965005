# The menu. Every target creates .venv and installs what it needs; nothing else is needed.
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-fast lint bench clean

## Train a small network on real images with the three monitors (about a minute).
demo: .venv/.run
	$(BIN)/ntk-train experiment=mlp

## Every test, the slow ones included.
test: .venv/.dev
	$(BIN)/python -m pytest -q

## The tests of a minute or less together.
test-fast: .venv/.dev
	$(BIN)/python -m pytest -q -m "not slow"

## Formatting, lint, types and the one-way flow of imports.
lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

## The kernel routes beside the usual recipes, in one interleaved run (a minute or two).
bench: .venv/.run
	$(BIN)/python tests/bench/kernels.py

clean:
	rm -rf .venv outputs multirun

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e ".[experiments]"
	touch $@

.venv/.dev: .venv/.run
	$(PIP) -e ".[dev]"
	touch $@
