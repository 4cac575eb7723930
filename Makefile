# A fresh machine needs Python 3.11 or later and make; everything else goes into .venv.
PYTHON ?= python3
CONFIG ?= configs/moe_tiny.py
WORKDIR ?= runs/$(basename $(notdir $(CONFIG)))
ARGS ?=

# The extra of setup.py to install. Where it is not given: what the machine has. Google's PCI vendor tells a TPU from other /dev/vfio.
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

# Each stamp is newer than what it was installed from. Another accelerator gets a new .venv: pip would leave the old one's plugins in it.
RUNTIME := .venv/installed-$(ACCELERATOR)
TESTING := .venv/testing-$(ACCELERATOR)
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check

# Large pages spare a CPU's training step a third of its time: XLA allocates gigabytes anew at each, page by page. glibc reads this.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test lint

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(RUNTIME) ## Train CONFIG (or resume) in WORKDIR, with ARGS such as "--config.train.steps=100"; then print a sample
	.venv/bin/python -m launch.train --config="$(CONFIG)" --workdir="$(WORKDIR)" $(ARGS)
	.venv/bin/python -m launch.generate --workdir="$(WORKDIR)" --prompt="def " --temperature=0.5

test: $(TESTING) ## Run the tests, with ARGS such as "-m slow" or a file
	.venv/bin/python -m pytest --numprocesses=2 --dist=worksteal $(ARGS)

lint: $(TESTING) ## Check style and formatting
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

$(RUNTIME): requirements.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "PYTHON=$(PYTHON) is not Python 3.11 or later: set PYTHON to one that is"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "PYTHON=$(PYTHON) cannot make environments: install its venv module (on Debian, python3-venv)"; exit 1; }
	@echo "Installing requirements.txt for $(ACCELERATOR) into .venv: some minutes the first time"
	@$(PYTHON) -m venv $(if $(filter-out $@,$(wildcard .venv/installed-*)),--clear) .venv
	@$(PIP) --editable ".[$(ACCELERATOR),run]"
	@touch $@

$(TESTING): $(RUNTIME)
	@echo "Installing the test extras into .venv"
	@$(PIP) --editable ".[$(ACCELERATOR),run,test]"
	@touch $@
