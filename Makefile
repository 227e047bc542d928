# Every target sets up .venv by itself: `make demo` and `make test` work on a fresh machine with Python >= 3.11.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory
.PHONY: .venv demo test test_gpu quality style clean

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

quality: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/python -c 'from importlib.util import find_spec as f; raise SystemExit("torchvision must not be installed here" if f("torchvision") else 0)'

style: .venv/.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .ruff_cache build dist demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
