# Every target sets up what it needs, in a virtual environment of its own.
#   PYTHON       the interpreter that makes the environment (3.11 or later, for the pinned versions)
#   TORCH_INDEX  the address of a package index to take torch from, such as PyTorch's own index of CPU builds
#   ARGS         arguments for `prefcore train` (demo) or for pytest (test, bench, gpu)
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS)
ifdef TORCH_INDEX
INSTALL += --extra-index-url $(TORCH_INDEX)
endif
NATIVE := CMakeLists.txt $(shell find csrc bindings -type f 2>/dev/null)
CXX_FILES = $(shell find csrc bindings -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test lint bench gpu gpu-install clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo   train on the data that comes along: a model learns a preference, in minutes, without a download'
	@echo 'make test   the test suite, on the CPU'
	@echo 'make lint   ruff, mypy and clang-format'
	@echo 'make bench  the benchmarks'
	@echo 'make gpu    the GPU tests and benchmarks, on a machine that has one'
	@echo 'make clean  remove the environment and what was built'

demo: $(VENV)/.installed-hf
	$(BIN)/prefcore train $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/pytest -m 'not gpu' $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run --Werror $(CXX_FILES))

bench: $(VENV)/.installed-bench,trl
	$(BIN)/pytest bench $(ARGS)
	$(BIN)/python -m bench.table
	$(BIN)/python -m bench.step

# GPU_PYTHON=python3 takes an interpreter whose torch sees the GPU already, and installs nothing into it but prefcore:
# pytest, hypothesis and transformers must be there, and trl for its rows of the tables.
ifdef GPU_PYTHON
gpu: gpu-install
else
GPU_PYTHON := $(BIN)/python
gpu: $(VENV)/.installed-test $(VENV)/.installed-bench,trl
endif
gpu:
	$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit(f"torch {torch.__version__} sees no GPU")'
	$(GPU_PYTHON) -m pytest -m gpu $(ARGS)
	$(GPU_PYTHON) -m bench.table --device cuda --dtype bfloat16 --T 4096 --D 4096 --V 128256
	$(GPU_PYTHON) -m bench.step --device cuda --dtype bfloat16 --model qwen2.5-0.5b --pairs 16 --k 2 4 8
	$(GPU_PYTHON) -m bench.step --device cuda --dtype bfloat16 --model llama-3.2-1b --pairs 8 --k 2 4 8

gpu-install:
	$(GPU_PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .

clean:
	rm -rf $(VENV) build dist

# The compiler's side comes first: the package is then built in this very environment, and its objects are kept in build/.
$(VENV)/.tools: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make needs Python 3.11 or later: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) scikit-build-core pybind11 cmake ninja
	@touch $@

$(VENV)/.installed-%: $(VENV)/.tools pyproject.toml $(NATIVE)
	$(INSTALL) --no-build-isolation --editable '.[$*]'
	@touch $@
