# The commands of the README. Each prepares what it needs, and again only when that has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# What the compiled module is made of; Python files are used where they lie (pip install --editable).
NATIVE := pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests benchmarks -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# On a machine with a Hopper GPU the kernels for it are not optional. jax's CUDA packages are
# installed before this one, which is built with their compiler when there is no other.
HOPPER := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -m1 '^9\.0')
ifneq ($(HOPPER),)
  export FLASHMLA_CUDA ?= ON
  CUDA_EXTRA := ,cuda13
endif

.PHONY: help demo test lint types format test-gpu sanitize bench gpu clean
.DELETE_ON_ERROR:

help:  ## This list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- For everyone ----------------------------------------------------------------------------

demo: $(VENV)/.hf  ## Generate with the small model that comes with the package, and check the result.
	$(BIN)/flashmla-jax demo

# A process for each core, to which whole files go. (A GPU's memory is for one process.)
PARALLEL := -n auto --maxprocesses 8 --dist loadfile

test: lint types  ## Lint, types, and all tests. What CI runs.
ifneq ($(PYTEST_ARGS)$(HOPPER),)
	$(BIN)/pytest $(PYTEST_ARGS)
else
	$(BIN)/pytest $(PARALLEL) --part operations
	$(BIN)/pytest $(PARALLEL) --part others
endif

lint: $(VENV)/.test  ## Lint and formatting of Python and C++.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

types: $(VENV)/.test  ## Static types.
	$(BIN)/mypy

format: $(VENV)/.test  ## Format Python and C++ in place.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## Remove everything that was built, .venv included.
	rm -rf build dist $(VENV) .mypy_cache .pytest_cache .ruff_cache

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.hf $(VENV)/.test: $(VENV)/.%: $(NATIVE) | $(BIN)/pip
	@echo "Installing flashmla-jax[$*$(CUDA_EXTRA)] in $(VENV); this takes a minute or two."
	$(if $(HOPPER),$(PIP) install --quiet 'jax[cuda13]')
	$(PIP) install --quiet --editable '.[$*$(CUDA_EXTRA)]'
	@touch $@ $(if $(filter test,$*),$(VENV)/.hf)

# --- For a machine with a Hopper GPU ---------------------------------------------------------

# The Python of .venv; or, where there is no network to fill it from, the installed one.
GPU_PYTHON := build/gpu-python

# XLA's search for its fastest products takes as long as all tests.
test-gpu: gpu  ## All tests on the GPU, with the full grid. Writes a record.
	XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS="--xla_gpu_autotune_level=0 $$XLA_FLAGS" \
		$(GPU_PYTHON) -P -m pytest --ignore=tests/test_wheel.py \
		$(or $(PYTEST_ARGS),--junitxml=build/gpu_tests.xml; status=$$?; \
		$(GPU_PYTHON) -P -m benchmarks.record_tests build/gpu_tests.xml && exit $$status)

sanitize: gpu  ## compute-sanitizer (memcheck, racecheck, synccheck) on a small grid. Writes a record.
	$(GPU_PYTHON) -P tests/gpu/sanitize.py

bench: $(if $(HOPPER),gpu,$(VENV)/.test)  ## The benchmark, on a Hopper GPU or else on the CPU. Writes a record.
	$(if $(HOPPER),$(GPU_PYTHON) -P,JAX_PLATFORMS=cpu $(BIN)/python) -m benchmarks.decode
	$(if $(HOPPER),$(GPU_PYTHON) -P -m benchmarks.model)
	$(if $(HOPPER),$(GPU_PYTHON) -P -m benchmarks.prefill)

gpu: | $(BIN)/pip
	@test -n "$(HOPPER)" || \
		{ echo "nvidia-smi shows no Hopper GPU (compute capability 9.0)"; exit 1; }
	@mkdir -p build
	@if test -e $(VENV)/.test || $(PIP) install --quiet --dry-run --ignore-installed --no-deps \
		--retries 0 --timeout 5 nanobind >/dev/null 2>&1; \
	then $(MAKE) --no-print-directory $(VENV)/.test && python='env PYTHONPATH=$(CURDIR) $(CURDIR)/$(BIN)/python'; \
	else $(MAKE) --no-print-directory build/site/.installed && \
		python='env PYTHONPATH=$(CURDIR)/build/site:$(CURDIR) $(PYTHON)'; \
	fi && printf '#!/bin/sh\nexec %s "$$@"\n' "$$python" > $(GPU_PYTHON) && chmod +x $(GPU_PYTHON)

build/site/.installed: $(NATIVE) $(shell find flashmla_jax -name '*.py')
	@echo "No network: installing flashmla-jax in build/site, beside the packages of $(PYTHON)."
	rm -rf build/site
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --target build/site .
	@touch $@
