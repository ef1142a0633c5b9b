# The only commands a newcomer needs. Each does its own set-up in .venv.
PYTHON ?= python3
# Any torch from 2.10 will do. This release is named because its CPU build, where the index has one, is a small download.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# Workers of pytest. Each has a torch with threads of its own, which must not spin while they wait for one another.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
export OMP_WAIT_POLICY ?= passive
TESTS_ENVIRONMENT := PATH="$(abspath $(BIN)):$$PATH" JOBS=$(JOBS) MAX_JOBS=$(JOBS)

.PHONY: help setup demo test check test-cpp lint bench bench-gpu gpu-check paper cuda-build cuda-extension sass soak nightly matrix clean
help:
	@echo "make demo    serve real sentences with the bundled model and print the table (sets .venv up first)"
	@echo "make test    the C++ and the Python tests; with the set-up about ten minutes on two slow cores"
	@echo "make check   what make test leaves out: sanitizers, planted bugs, emulated instruction sets and CUDA kernels, long tests"
	@echo "make bench   a five-minute subset of the benchmarks, with a roofline picture"
	@echo "make paper   the tables of the SiDA-MoE paper on models trained here, into docs/paper.md"
	@echo "make bench-gpu  one MoE layer on a GPU: decode and prefill shapes beside the floor"
	@echo "make gpu-check  all that wants a GPU, in eight minutes: tests, sanitizers, figures; DRY=1 without one"
	@echo "make soak    ten minutes of random batches, budgets and faults through the engine"
	@echo "make nightly 20,000 seeds of the expert engine's simulator, and the tests marked slow"
	@echo "make matrix  the Python tests with the oldest and newest torch and transformers and two between, into docs/versions.md"
	@echo "make cuda-build  compile the CUDA sources for every architecture, warnings as errors (nvcc)"
	@echo "make cuda-extension CUDA_PYTHON=...  build the extension against a CUDA build of torch, and test it"
	@echo "make sass    compile the CUDA kernels and check their machine code (nvcc, cuobjdump)"
	@echo "make lint    ruff, mypy, clang-format"

PIP := $(BIN)/python -m pip --disable-pip-version-check

$(VENV)/.tools: pyproject.toml Makefile
	@echo "== set-up, 1 of 3: an environment with torch in $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install "$(TORCH)"
	$(PIP) install -q "setuptools>=77" "cmake>=3.24" "ninja>=1.11" "pybind11>=2.12" wheel
	touch $@

SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

# pip shows nothing of a build: it is made before, into the folder where pip finds everything compiled.
$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	@echo "== set-up, 2 of 3: the extension"
	$(TESTS_ENVIRONMENT) $(BIN)/python setup.py -q build_ext
	@echo "== set-up, 3 of 3: the packages that it and its tests need"
	$(TESTS_ENVIRONMENT) $(PIP) install --no-build-isolation -e ".[test]"
	touch $@

setup: $(VENV)/.installed

demo: setup
	$(BIN)/python -m examples.demo

test: setup
	$(TESTS_ENVIRONMENT) tests/cpp/run.sh quick
	@echo "== Python tests"
	$(TESTS_ENVIRONMENT) $(BIN)/python -m pytest tests -q -n $(WORKERS) --dist loadfile

check: setup
	$(TESTS_ENVIRONMENT) tests/cpp/run.sh check
	@echo "== long Python tests"
	$(TESTS_ENVIRONMENT) $(BIN)/python -m pytest tests -v --check -m check

test-cpp: $(VENV)/.tools
	$(TESTS_ENVIRONMENT) tests/cpp/run.sh

$(VENV)/.lint: $(VENV)/.installed
	$(TESTS_ENVIRONMENT) $(PIP) install -q --no-build-isolation -e ".[test,dev]"
	touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

bench: setup
	$(BIN)/python -m bench --minutes 5

paper: setup
	$(BIN)/python -m bench.paper

bench-gpu: setup
	mkdir -p bench/results
	$(BIN)/python -m pytest bench/gpu/bench_gpu.py -m gpu -q -s --benchmark-enable --benchmark-json=bench/results/gpu.json

# In the environment of GPU_PYTHON as it is: a GPU machine often has no network. DRY=1: as far as there is no device.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-check:
	MAX_JOBS=$(JOBS) $(GPU_PYTHON) tools/gpu_check.py $(if $(DRY),--dry)

cuda-build: $(VENV)/.tools
	PATH="$(abspath $(BIN)):$$PATH" JOBS=$(JOBS) PYTHON=$(BIN)/python tools/cuda_build.sh

# The environment of CUDA_PYTHON must have a CUDA build of torch, transformers, pytest, pybind11, cmake and ninja.
CUDA_PYTHON ?= $(BIN)/python
cuda-extension: $(VENV)/.tools
	PATH="$(abspath $(BIN)):$$PATH" JOBS=$(JOBS) PYTHON=$(CUDA_PYTHON) tools/cuda_extension.sh

# cuobjdump is no part of a small toolkit: a package has it.
$(VENV)/.sass-tools: $(VENV)/.tools
	$(BIN)/python -m pip install -q "nvidia-cuda-cuobjdump>=13" "nvidia-cuda-nvdisasm>=13"
	touch $@

sass: cuda-build $(VENV)/.sass-tools
	@if [ -e build/cuda/compiled ]; then $(BIN)/python tools/sass_report.py --check; else echo "sass: skipped, see above"; fi

soak: setup
	$(TESTS_ENVIRONMENT) tests/cpp/run.sh program test_soak --seconds 600

nightly: setup
	$(TESTS_ENVIRONMENT) tests/cpp/run.sh program test_simulator --seeds 20000
	$(TESTS_ENVIRONMENT) $(BIN)/python -m pytest tests -v --slow -m slow

matrix: $(VENV)/.tools
	$(BIN)/python tools/matrix.py

clean:
	rm -rf build $(VENV) *.egg-info sida_ext/*.so sida_ext/_build_info.json
