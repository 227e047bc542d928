# Every target sets up .venv by itself: `make demo` and `make test` work on a fresh machine with Python >= 3.11.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory
.PHONY: .venv demo test test_gpu test-openflamingo quality style clean

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install --constraint constraints.txt

.venv: .venv/.stamp

# torch goes first so that every other package meets the pinned build.
.venv/.stamp: pyproject.toml constraints.txt
	@echo "Setting up .venv (some minutes the first time)"
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[test,demo,dev]'
	touch $@

demo: .venv/.stamp
	$(BIN)/fs-psm demo

test: .venv/.stamp
	$(BIN)/python -m pytest -m "not slow and not gpu"

test_gpu: .venv/.stamp
	$(BIN)/python -m pytest -m gpu

# The real OpenFlamingo, and open_clip itself. Both import torchvision, which must stay out of .venv, so they have an
# environment of their own. open-flamingo comes without its requirements: they ask for torch 2.0.1.
.venv-openflamingo/.stamp: pyproject.toml constraints.txt tests/openflamingo/constraints.txt
	@echo "Setting up .venv-openflamingo (some minutes the first time)"
	$(PYTHON) -m venv .venv-openflamingo
	.venv-openflamingo/bin/python -m pip --disable-pip-version-check -qq install --constraint constraints.txt \
		--constraint tests/openflamingo/constraints.txt torch torchvision pytest --editable '.[openflamingo]'
	.venv-openflamingo/bin/python -m pip --disable-pip-version-check -qq install --no-deps open-flamingo==2.0.1
	touch $@

# One thread: on tiny models more of them only wait for each other.
test-openflamingo: .venv-openflamingo/.stamp
	OMP_NUM_THREADS=1 .venv-openflamingo/bin/python -m pytest -m "not slow and not gpu" tests/openflamingo tests/test_open_clip_itself.py

quality: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/python -c 'from importlib.util import find_spec as f; raise SystemExit("torchvision must not be installed here" if f("torchvision") else 0)'

style: .venv/.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-openflamingo .pytest_cache .ruff_cache build dist demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
