.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# Of tests/constraints; the oldest NumPy has wheels for Python 3.10 to 3.12.
VERSIONS := oldest middle newest
PYTHON_OLDEST ?= $(PYTHON)
export HF_HUB_DISABLE_TELEMETRY := 1

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: $(BIN)/.installed  ## Make the environment in .venv

$(BIN)/.installed: setup.cfg setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install  ## Distil the quickstart student on generated images, about 10 minutes on two CPU cores
	@echo "The teacher answers 2,000 generated images, then a student is trained twice for 800 steps: alone, and with the answers."
	@echo "This takes about 10 minutes on two CPU cores and needs no network."
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/hf-detrkd distill --config scripts/recipes/quickstart.yaml --overwrite_output_dir
	@echo "Open outputs/quickstart/report.html for results and pictures. Next: docs/own_data.md, your own data."

test: install  ## Run the test suite
	$(BIN)/python -m pytest

test-fast: install  ## Run what needs no processes of its own and no grid of detectors, for daily work
	$(BIN)/python -m pytest -m fast

test-versions: $(VERSIONS:%=.venv-%/.installed)  ## Run the daily tests with the oldest, middle and newest versions of libraries
	for versions in $(VERSIONS); do .venv-$$versions/bin/python -m pytest -m fast || exit 1; done

.venv-%/.installed: tests/constraints/%.txt setup.cfg setup.py pyproject.toml
	$(if $(filter oldest,$*),$(PYTHON_OLDEST),$(PYTHON)) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-$*/bin/python -m pip install --quiet --editable '.[test]' --constraint $<
	touch $@

slow: install  ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow

quality: install  ## Check style, imports between rooms, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python scripts/house.py
	$(BIN)/mypy

soak: install  ## Kill runs at forty random moments and resume them
	HF_DETRKD_SOAK=20 $(BIN)/python -m pytest -n 1 -m slow --timeout 3600 -s tests/soak

fuzz: install  ## Give everything that reads 14,000 broken inputs
	HF_DETRKD_FUZZ=800 $(BIN)/python -m pytest tests/fuzz

docs: install  ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

release: install  ## Check version and changelog, build the packages, try the wheel; print the steps that are left
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python scripts/release.py

style: install  ## Fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: help install demo test test-fast test-versions slow soak fuzz quality docs release style
