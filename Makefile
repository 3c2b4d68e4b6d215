# make demo and make test do all set-up themselves. Each line here is a command a person could type.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NVCC   ?= nvcc
TORCH  ?= 2.13.0
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build test demo lint format cuda-check bench clean

build: $(VENV)/.built

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==$(TORCH) numpy setuptools wheel cmake ninja
	$(BIN)/pip install -q pytest pytest-timeout ruff mypy clang-format matplotlib rich mpi4py
	touch $@

$(VENV)/.built: $(VENV)/.installed CMakeLists.txt setup.py $(NATIVE)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

test: build lint cuda-check
	$(BIN)/python -m pytest tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

demo: build
	$(BIN)/python -m benchmarks.demo

bench: build
	$(BIN)/python -m benchmarks.collectives -n 3 --rounds 3 --rates 1gbit --json out/collectives.json
	$(BIN)/python -m benchmarks.training --rounds 2 --steps 4 --rates 500mbit,1gbit --json out/training.json

clean:
	rm -rf build out $(VENV)/.built dear/_C*.so
