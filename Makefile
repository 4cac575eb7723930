# A fresh machine needs Python 3.11 or later and make; everything else goes into .venv.
PYTHON ?= python3
CONFIG ?= configs/moe_tiny.py
WORKDIR ?= runs/$(basename $(notdir $(CONFIG)))
ARGS ?=

# Which extra of setup.py to install: by default the one for the accelerator that the machine has.
# A device in /dev/vfio may be anything, and is a TPU if its PCI vendor is Google.
ifeq ($(ACCELERATOR),)
override ACCELERATOR := $(shell \
	if ls /dev/nvidia[0-9]* >/dev/null 2>&1 || nvidia-smi -L 2>/dev/null | grep -q GPU; then echo cuda13; \
	elif ls /dev/accel[0-9]* >/dev/null 2>&1; then echo tpu; \
	elif ls /dev/vfio/[0-9]* >/dev/null 2>&1 && grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor; then echo tpu; \
	else echo cpu; fi)
endif
ifeq ($(filter $(ACCELERATOR),cuda13 tpu cpu),)
$(error ACCELERATOR=$(ACCELERATOR) is not known: set it to cuda13, tpu or cpu)
endif

# A stamp file is newer than the files that its packages were installed from. If the accelerator
# changes, .venv is made anew, since pip would leave the plugins of the old accelerator in it.
RUNTIME := .venv/installed-$(ACCELERATOR)
TESTING := .venv/testing-$(ACCELERATOR)
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test lint gpu

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(RUNTIME) ## Train CONFIG in WORKDIR, or resume it there, with ARGS such as "--config.train.steps=100"; print a sample
	.venv/bin/python -m launch.train --config="$(CONFIG)" --workdir="$(WORKDIR)" $(ARGS)
	.venv/bin/python -m launch.generate --workdir="$(WORKDIR)" --prompt="def " --temperature=0.5

# Commands give themselves large pages (launch/large_pages.py), and tests do not.
test: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
test: $(TESTING) ## Run the tests, with ARGS such as "-m slow" or a file
	.venv/bin/python -m pytest --numprocesses=2 --dist=worksteal $(ARGS)

lint: $(TESTING) ## Check style, formatting and types
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m basedpyright --pythonpath .venv/bin/python

gpu: $(TESTING) ## Run the checks and measurements that need a GPU, or go on with them
	.venv/bin/python -m launch.gpu --out=docs/benchmarks/gpu $(ARGS)

$(RUNTIME): requirements.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "PYTHON=$(PYTHON) is not Python 3.11 or later: set PYTHON to one that is"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "PYTHON=$(PYTHON) cannot make environments: install its venv module" \
			"(on Debian, python3-venv)"; exit 1; }
	@echo "Installing requirements.txt for $(ACCELERATOR) into .venv: some minutes the first time"
	@$(PYTHON) -m venv $(if $(filter-out $@,$(wildcard .venv/installed-*)),--clear) .venv
	@$(PIP) --editable ".[$(ACCELERATOR),run]"
	@touch $@

$(TESTING): $(RUNTIME)
	@echo "Installing the test extras into .venv"
	@$(PIP) --editable ".[$(ACCELERATOR),run,test]"
	@touch $@
