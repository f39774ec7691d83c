# The two commands that need nothing but Python and make:
#   make sample PROMPT="a red apple"   draw a picture with the model in the box
#   make test                          every check that CI makes
PYTHON ?= python3
PROMPT ?= a red apple
BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev

# As it was typed, quotes and dollars included; the shell takes it from its environment.
export LATENTDIFF_PROMPT := $(value PROMPT)
unexport PROMPT

.PHONY: help sample test campaign gpu format
help:
	@sed -n 's/^#   //p' Makefile

sample: $(INSTALLED)
	@$(BIN)/latentdiff sample --prompt "$$LATENTDIFF_PROMPT"

test: $(INSTALLED_DEV)
	@echo "== format"
	@$(BIN)/ruff format --check .
	@echo "== lint and docstrings"
	@$(BIN)/ruff check .
	@echo "== types"
	@$(BIN)/pyright
	@echo "== import contract"
	@$(BIN)/lint-imports
	@echo "== tests"
	@OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

# Hours: every fault of docs/faults.md. Stopped, it goes on where it was.
campaign: $(INSTALLED_DEV)
	$(BIN)/python benchmarks/faults.py --out docs

# With a GPU, about 25 minutes: the tests that need one, then speed at Stable Diffusion's size.
gpu: $(INSTALLED_DEV)
	$(BIN)/pytest -m gpu
	$(BIN)/python benchmarks/sample.py --parts gpu --out docs
	$(BIN)/python benchmarks/train.py all --size sd1 --out docs

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("latentdiff needs Python 3.11 or newer; this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

$(INSTALLED): pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --editable .
	@touch $@

$(INSTALLED_DEV): pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@ $(INSTALLED)
