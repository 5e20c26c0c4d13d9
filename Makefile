# Every target makes its own virtual environment; a stamp file makes the second run quick.
VENV ?= .venv
PYTHON ?= python3
OUTPUT ?= out/demo

BIN := $(VENV)/bin
# The editable install is redone when one of these changes: what is installed, or what is compiled.
SOURCES := pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help install demo test lint bench bench-report readme gpu clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*##/\t/'

install: $(VENV)/.dev  ## everything for development, editable, in $(VENV)

demo: $(VENV)/.demo  ## play the shipped checkpoint at several budgets and write out/demo/report.html
	$(BIN)/flexlam-fast demo --output $(OUTPUT)

test: $(VENV)/.dev  ## the tests, in as many processes as there are cores, then lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal
	@$(MAKE) --no-print-directory lint

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev  ## the benchmarks on this machine
	$(BIN)/python -m pytest bench/ --benchmark-only

bench-report: $(VENV)/.dev  ## fill the README's tables and draw the plots from the files that hold the figures
	$(BIN)/python bench/report.py

readme: bench-report  ## the same

gpu:  ## what a GPU machine can say, in stages: STAGES=headline runs one, none lists them, DRY=1 rehearses without a GPU
	$(PYTHON) bench/gpu.py $(if $(DRY),--dry-run) $(if $(OUT),--out $(OUT)) $(STAGES)

clean:  ## remove what was built, not the environment
	rm -rf build dist out *.egg-info flexlam_fast/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python $(SOURCES)
	@echo "installing into $(VENV): the first time this downloads PyTorch and takes minutes"
	$(INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(BIN)/python $(SOURCES)
	@echo "installing into $(VENV): the first time this downloads PyTorch and takes minutes"
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.demo
