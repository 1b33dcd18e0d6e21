# `make` alone prints the targets.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Several processes of one thread each: threads of several processes would wait for each other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help fit ablation test test-slow benchmark benchmark-full lint types format docs-fashion clean

help:  ## these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

fit: $(VENV)/installed  ## install, and train the default experiment (handwritten digits)
	@# one device: images of 8x8 gain nothing from more, and not every number divides the batch
	@$(BIN)/python -m ddpm_lightning fit --trainer.devices 1

ablation: $(VENV)/installed  ## the paper's Table 2 on digits: six trainings, within an hour on two cores
	@$(BIN)/python -m experiments.ablation

test: $(VENV)/installed-test  ## the tests, without a network, in a quarter of an hour on two threads of a core
	$(PYTEST) -n auto -m "not slow"

test-slow: $(VENV)/installed-test  ## the rest: full-size networks and long runs
	$(PYTEST) -m slow --timeout 7200 --override-ini faulthandler_timeout=7190

benchmark: $(VENV)/installed-benchmark  ## rows beside peers, within half an hour on two quiet cores; docs/benchmarks.md
	$(BIN)/python -m benchmarks

benchmark-full: $(VENV)/installed-benchmark  ## the long rows and the curves of growth, within four hours
	$(BIN)/python -m benchmarks --full
	$(BIN)/python -m benchmarks.growth

lint: $(VENV)/installed-test  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test  ## mypy --strict
	$(BIN)/mypy

format: $(VENV)/installed-test  ## put the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs-fashion: $(VENV)/installed  ## the pictures of docs/fashion.md, from the run in runs/fashion
	@test -f runs/fashion/checkpoints/last.ckpt || { echo "error: no runs/fashion; docs/fashion.md says how to train it" >&2; exit 1; }
	rm -f docs/fashion_*
	@# the page's commands: what stands between ```sh and ```
	sed -n '/^```sh$$/,/^```$$/{/^```/!p}' docs/fashion.md | PATH="$(BIN):$$PATH" sh -ex

clean:  ## remove the environment; runs/ stays
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON); on Debian: sudo apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) lacks venv; on Debian: sudo apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/installed-benchmark: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[benchmark]'
	@touch $@
