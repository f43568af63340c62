# Each target makes what it needs first: `make demo` and `make test` work in a fresh checkout.
#
#   PYTHON=python3.12            the interpreter that the environment is made from
#   VENV=/some/where             where the environment lies
#   VENV_ARGS=--system-site-packages   use the torch that $(PYTHON) already has (containers)
#   TORCH="torch==2.11.0"        another torch than the one chosen below
#   PYTEST_ARGS="-n 0 -k merge"  what `make test` adds to pytest's command line

PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

NVIDIA := $(shell nvidia-smi --list-gpus 2>/dev/null | grep -m 1 GPU)
ROCM := $(shell test -e /dev/kfd && echo kfd)
ifneq ($(NVIDIA),)
TORCH ?= torch>=2.6
JOBS ?= 1
else ifneq ($(ROCM),)
TORCH ?= torch>=2.6
TORCH_BACKEND ?= auto
JOBS ?= 1
else
# Without a GPU everything runs in Triton's interpreter, on versions that are known to agree.
TORCH ?= torch==2.13.0
TRITON ?= "triton==3.6.0; sys_platform == 'linux'"
TORCH_BACKEND ?= cpu
JOBS ?= 2
endif
PYTEST_ARGS ?= -n $(JOBS)
# What runs compiled where there is a GPU; the rest belongs to the interpreter, or to neither.
ON_GPU := tests/gpu tests/compat tests/test_operators.py tests/test_prefill_operators.py tests/test_merge.py \
	tests/test_merge_operators.py tests/test_recall.py tests/test_deepseek_v3_layer.py \
	tests/test_program_defaults.py tests/mutations

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint format docs bench clean

help: ## what there is to make
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: $(VENV)/.demo ## decode the shapes of real models (without a GPU: small ones) and check each against the reference
	$(BIN)/mla-triton check

test: $(VENV)/.test ## the whole test suite
ifneq ($(NVIDIA)$(ROCM),)
	CUDA_VISIBLE_DEVICES= HIP_VISIBLE_DEVICES= $(BIN)/python -m pytest $(PYTEST_ARGS)
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(ON_GPU)
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

lint: $(VENV)/.lint ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.lint ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.demo ## decode speed on this machine's GPU, beside the ceilings measured in the same run
	$(BIN)/python benchmarks/decode.py $(BENCH_ARGS)

docs: $(VENV)/.demo ## write the generated pages of docs/ again
	$(BIN)/python docs/generate_support.py
	$(BIN)/python tests/mutations/mutation_table.py
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/report_tuning.py

clean: ## remove the environment and every cache
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, in layers. A stamp is touched when its layer stands, so that a target interrupted
# half-way starts again there, and one that stands costs nothing.

$(VENV)/.venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mla-triton needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	@touch $@

# The torch on the registry for Linux is a CUDA build of several GB. Where a CPU or ROCm build is
# wanted, take it from an index of pip's configuration, else let uv find it, else take what there is.
$(VENV)/.torch: $(VENV)/.venv
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then echo "torch is there already"; \
	elif [ -z "$(TORCH_BACKEND)" ]; then set -x; $(PIP) install "$(TORCH)"; \
	else set -x; $(PIP) install "$(TORCH)+$(TORCH_BACKEND)" 2>/dev/null \
	  || { $(PIP) install uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend $(TORCH_BACKEND) "$(TORCH)"; } \
	  || $(PIP) install "$(TORCH)"; fi
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install $(TRITON) --editable '.[interpreter]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) install $(TRITON) --editable '.[test]'
	@touch $@ $(VENV)/.demo

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(PIP) install $(TRITON) --editable '.[lint]'
	@touch $@
