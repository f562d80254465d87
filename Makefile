# make demo: install and do the main job once · make test: lint, types, tests · make venv: the environment alone
# make kernels: the laws about floats under the matrix kernels of other machines
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BACKEND ?= $(shell if [ "$$(uname -s)" = Darwin ]; then echo metal; \
	elif nvidia-smi >/dev/null 2>&1; then echo cuda13; else echo cpu; fi)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Of two cores: a third process works while the others wait, for a server to end or a program to be given up.
WORKERS ?= 3
# Kept bytecode is half a second less for each process that a test starts.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test tests kernels venv venv-dev lint types
demo: venv
	$(BIN)/lathe demo $(ARGS)

# Types are checked beside the tests, which wait now and then.
test: venv-dev lint
	@$(MAKE) --no-print-directory -j2 types tests

tests: venv-dev
	$(BIN)/python -m pytest -m "not large" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

kernels: venv-dev
	$(BIN)/python tests/kernels.py $(ARGS)

lint: venv-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv-dev
	$(BIN)/mypy

venv: $(VENV)/.installed-$(BACKEND)
venv-dev: $(VENV)/.installed-$(BACKEND)-dev

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Lathe needs Python 3.11 or newer on PATH"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-$(BACKEND): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing Lathe for the $(BACKEND) backend of MLX into $(VENV)"
	$(PIP) -e '.[$(BACKEND),ui]'
	@touch $@

$(VENV)/.installed-$(BACKEND)-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing Lathe with its development tools for the $(BACKEND) backend of MLX into $(VENV)"
	$(PIP) -e '.[$(BACKEND),ui,dev]'
	$(PIP) --no-deps instructor
	@touch $@ $(VENV)/.installed-$(BACKEND)
