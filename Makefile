PYTHON ?= python3
# The version is named: a bare `torch` may download the newest CUDA build, several gigabytes.
TORCH ?= torch==2.13.0
CXX ?= c++

.PHONY: demo test vision lint sanitize mutate clean
demo: .venv/installed
	.venv/bin/mfkernels demo

test: .venv/installed
	.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# Networks and users of timm, transformers and torchvision, with the newest PyTorch (ten minutes).
vision: .venv/installed .venv-vision/installed
	.venv-vision/bin/python -m pytest -m vision tests/test_vision.py

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/*/*.*)
	.venv/bin/mypy

# Address and undefined-behaviour sanitizers over the tests of the kernels (an hour or more); thread
# sanitizer over the threaded parts on plain threads.
SANITIZED = build/sanitize
sanitize: .venv/installed
	MFKERNELS_SANITIZE=address,undefined CXX="$(CXX)" .venv/bin/pip install -q --disable-pip-version-check \
	  --no-deps --no-build-isolation --upgrade --target $(SANITIZED) .
	cd $(SANITIZED) && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(CURDIR)/.venv/bin/python -m pytest -c $(CURDIR)/pyproject.toml -p no:cacheprovider \
	  --rootdir $(CURDIR) $(CURDIR)/tests/test_contract.py $(CURDIR)/tests/test_deploy.py $(CURDIR)/tests/test_deploy_chain.py -k "not fuzz and not compile and not export"
	$(CXX) -std=gnu++17 -O1 -g -fsanitize=thread -Wno-psabi -DMFK_GENERIC_ONLY -DMFK_ISA=generic -o $(SANITIZED)/threads \
	  tests/sanitize/threads.cpp csrc/isa.cpp $(wildcard csrc/cpu/mobile_former_*.cpp csrc/cpu/deployed_*.cpp)
	.venv/bin/python tests/sanitize/plan.py $(SANITIZED)
	$(SANITIZED)/threads $(SANITIZED)

# Breaks each kernel and checks that the tests notice (half an hour).
mutate: .venv/installed
	.venv/bin/python tests/mutate.py build/mutate

clean:
	rm -rf .venv build demo-output *.egg-info mfkernels/*.so

# Everything that any target needs, again whenever the C++ sources or the build change. The Python sources
# are used where they lie.
.venv/installed: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	@command -v $(PYTHON) >/dev/null || { echo "mfkernels: no $(PYTHON): install Python >= 3.10, or type make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "mfkernels: $(PYTHON) is older than 3.10: type make PYTHON=/path/to/a/newer/python" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "mfkernels: $(PYTHON) has no venv: install it (on Debian: python3-venv)" >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { echo "mfkernels: no C++17 compiler: install g++ or clang++, or type make CXX=/path/to/compiler" >&2; exit 1; }
	@test -x .venv/bin/python || { echo "making .venv and installing (a few minutes)"; $(PYTHON) -m venv .venv; }
	.venv/bin/pip install -q --disable-pip-version-check $(TORCH) setuptools wheel cmake ninja
	CXX="$(CXX)" .venv/bin/pip install -q --disable-pip-version-check -e '.[demo,test,lint]' --no-build-isolation
	@touch $@
