# The menu. Every target creates .venv and installs what it needs; nothing else is needed.
PYTHON ?= python3.11
BIN := .venv/bin
# Tests of small tensors: a process for each core is faster than a thread for each.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo experiments test test-fast lint bench bench-rivals clean

## Train a small network on real images with the three monitors (about a minute).
demo: .venv/.run
	$(BIN)/ntk-train experiment=mlp

## Every study that reproduces a known result, and the table of what they find (about ten
## minutes on two cores); what was finished before is not run again.
experiments: .venv/.run
	$(BIN)/ntk-experiments

## Every test, the slow ones included.
test: .venv/.dev
	$(PYTEST)

## The tests without the long ones (`make test-fast WORKERS=8` on eight cores).
test-fast: .venv/.dev
	$(PYTEST) -m "not slow"

## Formatting, lint, types and the one-way flow of imports.
lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

## Our kernels beside their rivals, in one interleaved run (a quarter of an hour), or
## how their cost grows (`make bench ARGS=growth`); `make bench ARGS=--help` says more.
bench: .venv/.run
	PYTHONPATH=tests $(BIN)/python -m bench $(ARGS)

## The rivals that are libraries, each in an environment of its own: `bench` finds them.
bench-rivals: .venv-rivals/.done .venv-jax/.done

.venv-rivals/.done: constraints.txt
	$(PYTHON) -m venv .venv-rivals
	echo "*" > .venv-rivals/.gitignore
	.venv-rivals/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt torch nngeometry==0.4 curvlinops-for-pytorch==3.0.1
	touch $@

# The last jax for which all of neural-tangents works.
.venv-jax/.done:
	$(PYTHON) -m venv .venv-jax
	echo "*" > .venv-jax/.gitignore
	.venv-jax/bin/python -m pip install --quiet --disable-pip-version-check \
		neural-tangents==0.6.5 jax==0.4.25 jaxlib==0.4.25 "numpy<2" "scipy<1.13"
	touch $@

clean:
	rm -rf .venv .venv-rivals .venv-jax outputs multirun

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e ".[experiments]"
	touch $@

.venv/.dev: .venv/.run
	$(PIP) -e ".[dev]"
	touch $@
