# make demo, make test: all that a fresh machine with Python >= 3.10, a C++20 compiler and make needs.
# FIAK_REQUIRE=all makes every skipped part an error. CMAKE_ARGS is passed on, for example CMAKE_ARGS=-DFIAK_CUDA=off or
# CMAKE_ARGS=-DFIAK_CUDA_ARCHS=all. make soak goes through all combinations of what the tests of the CUDA kernels, and
# of sizes around the blocks of all kernels, vary, for SOAK_MINUTES each, and prints what FIAK_SOAK_FROM must be to go on
# from there. SANITIZED is what ctest gets to choose the tests of make sanitize. make test-torch TORCH=2.15.0 tests the
# ops, modules and conversion with another torch, compiling only what includes its headers; TRANSFORMERS=5.24.0 and
# TIMM=1.0.31 choose the others, TESTS="modules convert" some of the files, RESULTS the table that gets a row, WHEEL what
# is installed, without a compiler in reach. make wheel puts wheels for this torch and the sdist into dist/. make bits
# writes a hash of all that every C++ test computes, on every instruction set and in device code, to
# build/release/bits.txt: the same lines before and after a change that should change no result.
PYTHON ?= python3
SOAK_MINUTES ?= 60
JOBS ?= $(shell nproc)
SANITIZED ?=
TORCH ?=
TRANSFORMERS ?=
TIMM ?=
TESTS ?=
RESULTS ?=
WHEEL ?=
VENV := $(CURDIR)/.venv
export PATH := $(VENV)/bin:$(PATH)
export FIAK_REQUIRE ?=

CONFIGURE = cmake -S . -G Ninja -DPython_EXECUTABLE=$(VENV)/bin/python -DFIAK_REQUIRE=$(FIAK_REQUIRE) $(CMAKE_ARGS)
CXX_FILES = $(shell find csrc benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-torch wheel soak bits build configure sanitize sanitize-address sanitize-thread bench lint format clean

demo: build
	python -m fiak_ext demo $(DEMO_ARGS)

test: build $(VENV)/installed-dev
	cmake --build build/release
	ctest --test-dir build/release --parallel $(JOBS) --output-on-failure
	$(MAKE) sanitize-address
	@cat build/release/skipped.txt
	python -m pytest --numprocesses $(JOBS)

test-torch: $(if $(WHEEL),,build)
	$(PYTHON) tools/test_torch.py --torch "$(TORCH)" --transformers "$(TRANSFORMERS)" --timm "$(TIMM)" \
	  $(if $(WHEEL),--wheel "$(WHEEL)",--kernels build/release) --jobs $(JOBS) \
	  $(if $(TESTS),--tests "$(TESTS)") $(if $(RESULTS),--results "$(RESULTS)")

wheel: $(VENV)/installed-dev
	python tools/wheel.py
	python -m build --sdist

soak: configure
	cmake --build build/release --target fiak_tests
	FIAK_SOAK=$(SOAK_MINUTES) build/release/fiak_tests --gtest_filter='*EveryPair*'

bits: configure
	cmake --build build/release
	rm -f build/release/bits*.txt
	for tests in build/release/fiak_tests build/release/fiak_emulated_tests; do \
	  test ! -x $$tests || FIAK_BITS=build/release/bits-$${tests##*/}.txt $$tests --gtest_brief=1 || exit 1; done
	for part in build/release/bits-*.txt; do sed "s|^|$${part##*bits-} |" $$part; done >build/release/bits.txt

build: configure
	cmake --build build/release --target python
	cmake --install build/release --component python --prefix $(CURDIR)

configure: $(VENV)/installed
	$(CONFIGURE) -B build/release -DFIAK_BUILD_TESTS=ON -DFIAK_BUILD_BENCHMARKS=ON

sanitize: sanitize-address sanitize-thread

sanitize-address: SANITIZERS := address,undefined
sanitize-thread: SANITIZERS := thread
sanitize-address sanitize-thread: $(VENV)/installed
	$(CONFIGURE) -B build/$@ -DFIAK_BUILD_TESTS=ON -DFIAK_SANITIZE=$(SANITIZERS)
	cmake --build build/$@
	ctest --test-dir build/$@ --parallel $(JOBS) --output-on-failure $(SANITIZED)

bench: build
	cmake --build build/release
	build/release/fiak_benchmarks
	python -m benchmarks.compare

lint: $(VENV)/installed-dev
	ruff check
	ruff format --check
	clang-format --dry-run -Werror $(CXX_FILES)
	shellcheck .ci/run benchmarks/gpu.sh findings/*.sh
	mypy

format: $(VENV)/installed-dev
	ruff check --fix
	ruff format
	clang-format -i $(CXX_FILES)

clean:
	rm -rf build fiak_ext/*.so

$(VENV)/installed: requirements.txt
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	pip install --requirement requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	pip install --requirement requirements-dev.txt
	touch $@
