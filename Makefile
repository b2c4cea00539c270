# Two commands on a fresh machine (Python >= 3.11 and make): `make tour` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help tour lab doctor test bench bench-quick clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

tour: .venv/.tour  ## run notebooks 00 to 05 headless; report in runs/tour/index.html
	$(BIN)/demem-lab tour

lab: .venv/.tour  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=. notebooks/00_start_here.ipynb  # so that links to README and METHODS work

doctor: .venv/.tour  ## is this machine ready? a line for each thing, with its fix
	@$(BIN)/demem-lab doctor

test: .venv/.test  ## run everything CI runs
	@sh tests/browser/install_chromium.sh
	$(BIN)/ruff check .
	@store=$$(mktemp -d) && status=0 && \
	DEMEM_STORE="$$store" $(BIN)/python -m pytest -q --durations=15 || status=$$?; rm -rf "$$store"; exit $$status

bench: .venv/.bench  ## speed and memory against the peers, with ratios; 25 minutes on two quiet cores
	$(BIN)/python benchmarks/run.py

bench-quick: .venv/.bench  ## the same with fewer models and rounds, 3 minutes
	$(BIN)/python benchmarks/run.py --quick

clean:  ## remove the environment and all outputs (not your cached results)
	rm -rf .venv runs build *.egg-info

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "demem_lab needs Python >= 3.11, this is %s; set PYTHON=..." % sys.version.split()[0])'
	$(PYTHON) -m venv .venv

.venv/.tour: pyproject.toml | .venv/bin/python
	@echo "setting up .venv (PyTorch is large: a few minutes the first time)"
	$(BIN)/pip install -q -e ".[attacks]"
	@touch $@

.venv/.test: pyproject.toml | .venv/bin/python
	@echo "setting up .venv (PyTorch is large: a few minutes the first time)"
	$(BIN)/pip install -q -e ".[attacks,test]"
	@touch $@ .venv/.tour

.venv/.bench: pyproject.toml | .venv/bin/python
	@echo "setting up .venv (PyTorch is large: a few minutes the first time)"
	$(BIN)/pip install -q -e ".[attacks,bench]"
	$(BIN)/pip install -q --no-deps torchattacks foolbox
	@touch $@ .venv/.tour
