# `make help` lists the targets. Each does its own set-up; nothing but Python 3.11 or newer is assumed.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
DURATION ?= 240
# What is installed stays what it is, unless another is asked for.
ACCELERATOR ?= $(if $(wildcard .venv/.installed-gpu),gpu,cpu)

VENV := .venv
BIN := $(VENV)/bin
LOCK := deploy/requirements-$(ACCELERATOR).lock
STAMP := $(VENV)/.installed-$(ACCELERATOR)

.PHONY: help demo test bench lint lock clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tailrace needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r deploy/bootstrap.lock
	@echo "Installing the locked packages into $(VENV) (about half a minute)"
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --require-hashes -r $(LOCK)
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## the whole system with simulated readers for DURATION=240 seconds
	@$(BIN)/python -m deploy.demo --duration $(DURATION)

test: $(STAMP) ## every test: unit, contract, integration, recovery, end to end
	$(BIN)/python -m pytest

bench: $(STAMP) ## measurements, as a table and as JSON in tests/bench/results.json
	$(BIN)/python -m tests.bench

lint: $(STAMP) ## ruff and strict mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: $(STAMP) ## pins anew what pyproject.toml asks for, with hashes
	echo "uv==$$($(BIN)/uv --version | cut -d' ' -f2)" | $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header - -o deploy/bootstrap.lock
	for accelerator in cpu gpu; do \
	  $(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-emit-index-url --no-header \
	    pyproject.toml --extra $$accelerator --extra train --extra trackers --extra redis --extra demo --extra dev \
	    -o deploy/requirements-$$accelerator.lock; \
	done

clean: ## removes the virtual environment and everything Tailrace wrote here
	rm -rf $(VENV) .tailrace
