# SPDX-License-Identifier: Apache-2.0
# Needs GNU make, Python 3.11 and, for the FPGA's C simulation, g++. Everything else goes into .venv.

PYTHON ?= python3.11
# An index with PyTorch's CPU builds (PyTorch's own site names one): torch alone is then taken from there. Empty: the index pip is set up
# with, whose torch brings several GB of CUDA packages on Linux.
TORCH_INDEX ?=
# Test processes.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAGES := train quantize export targets runtimes
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.PHONY: demo test test-device test-arm64 lint format install clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/isthmus demo --force

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS)

# What a device needs, in an environment that has only that: installs into a temporary folder.
test-device: $(STAMP)
	$(BIN)/python -m pytest -m slow -n $(JOBS)

# The device package under an emulated arm64: needs root, Debian's qemu-user-static and debootstrap, a network.
test-arm64: $(STAMP)
	$(BIN)/python tests/arm64/emulate.py --transcript docs/arm64.md

lint: $(STAMP) typecheck-tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd .typecheck && MYPYPATH=. ../$(BIN)/python -m mypy --config-file ../pyproject.toml --explicit-package-bases -p isthmus
	$(BIN)/python -m pytest -q tests/unit/test_layers.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

# The stamp comes last: an installation that was cut off starts again, a finished one is redone only when a pin changes.
# torch goes first and alone, so that the second index is asked for one package only (and passed over where it cannot be reached).
$(STAMP): constraints.txt pyproject.toml setup.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not here: install Python 3.11, or name another one: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into $(VENV) (some minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq --no-deps --retries 2 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt torch
	@$(PIP) install -qq -c constraints.txt -e '.[dev]'
	@touch $@

# mypy cannot see package_dir of setup.py: show it the root folders as one package.
.PHONY: typecheck-tree
typecheck-tree:
	@rm -rf .typecheck/isthmus && mkdir -p .typecheck/isthmus
	@for name in $(filter-out __pycache__,$(notdir $(wildcard core/*))); do ln -s ../../core/$$name .typecheck/isthmus/$$name; done
	@for name in $(STAGES); do ln -s ../../$$name .typecheck/isthmus/$$name; done

clean:
	rm -rf $(VENV) .typecheck .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
