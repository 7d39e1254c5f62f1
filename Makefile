PYTHON ?= python3
# The version is named: a bare `torch` would download the newest CUDA build, several gigabytes.
TORCH ?= torch==2.13.0

.PHONY: test
test: .venv/installed
	.venv/bin/python -m pytest

.venv/installed: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q $(TORCH) setuptools wheel cmake ninja
	.venv/bin/pip install -q -e '.[test]' --no-build-isolation
	touch $@
