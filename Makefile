# Each target does all its own set-up, in the folder .venv, the first time and whenever the requirements change.
#
#   make demo      train a small Mamba-attention hybrid on Python's standard library; it writes samples as it learns
#   make test      run every test; with OP=selective_scan or MIXER=mamba, those of one op or mixer
#   make lint      ruff and mypy
#   make bench     time ops, mixers and models beside other packages, into runs/
#   make readme    write the README's tables anew
#   make clean     remove the virtual environment and build outputs; runs/ stays
#
#   make demo STEPS=1000                                              train for longer, or go on: the text gets better
#   make demo PYTHON=python3.12                                       another interpreter
#   make demo TORCH="torch --index-url https://example.org/simple"    PyTorch from another index

PYTHON ?= python3
TORCH ?= torch
STEPS ?= 350

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo

.PHONY: demo test lint bench readme clean native

# A run that was stopped goes on, to more steps if asked; one that has them all only writes again.
demo: native
	@if [ -e $(DEMO)/.complete ] && steps=$$(cat $(DEMO)/.complete) && [ "$${steps:-1000}" -ge $(STEPS) ]; then \
		echo "$(DEMO) is trained; to train it again: rm -r $(DEMO)"; \
	elif [ -e $(DEMO)/train.yaml ]; then \
		$(BIN)/ssmzoo train --resume $(DEMO) --set steps=$(STEPS) && echo $(STEPS) > $(DEMO)/.complete; \
	else \
		$(BIN)/ssmzoo train mamba-hybrid-tiny --out $(DEMO) --set steps=$(STEPS) --set sample_every=80 \
			&& echo $(STEPS) > $(DEMO)/.complete; \
	fi
	@echo
	$(BIN)/ssmzoo generate $(DEMO) "def "

# One PyTorch thread a worker: two workers with two threads each would wait for one another.
test: native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal \
		$(foreach op,$(OP),--op $(op)) $(foreach mixer,$(MIXER),--mixer $(mixer))

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: native
	$(BIN)/ssmzoo bench --peers

readme: native
	$(BIN)/python docs/tables.py

# The kernels whose sources, flags or compiler have changed since they were compiled last.
native: $(READY)
	@$(BIN)/python -m ssmkernels.native.build --optional

# PyTorch comes first and alone, so that a build of the user's choice is there before anything asks for one. A build for
# GPUs brings the triton that it was made for; only where it brings none does our own pin hold.
$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ssmzoo needs Python 3.10 or later; name one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@grep -v '^triton' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --constraint $(VENV)/constraints.txt $(TORCH)
	@$(BIN)/python -c 'import triton' 2> /dev/null || cp constraints.txt $(VENV)/constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
