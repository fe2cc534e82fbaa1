# make run        influence on TinyStories from end to end: environment, install, `python -m helpers.run`
# make test       lint, unit tests, and every notebook in fast mode
# make notebooks  execute every notebook in full, in place (NB="notebooks/06*.ipynb" for some of them)
# make soak       fit and score, killed 20 times at random points, against uninterrupted runs; 500 new random cases of
#                 every property in tests/test_properties.py
# make stale      list the notebooks whose source or helpers changed since they ran
#
# TINYSTORIES and STORIES choose the model and the stories of `make run`: bundled (the default), hub, or a folder.

SHELL := /bin/bash
VENV  := .venv
BIN   := $(VENV)/bin
NB    ?= notebooks/*.ipynb
JOBS  ?= 2

# The first interpreter that is new enough and can make an environment; `make run PYTHON=...` to choose another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

# JOBS processes share the cores, and the kernels are those of this environment, whatever else is installed.
THREADS := $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); t=$$((n / $(JOBS))); echo $$((t > 0 ? t : 1)))
TESTENV := FAST=1 OMP_NUM_THREADS=$(THREADS) TOKENIZERS_PARALLELISM=false JUPYTER_PREFER_ENV_PATH=1

.PHONY: run test lint notebooks soak stale install clean
.DEFAULT_GOAL := run

run: install
	@$(BIN)/python -m helpers.run

test: lint
	$(TESTENV) $(BIN)/python -m pytest -v -n $(JOBS) --dist worksteal --durations=15 \
	  --nbmake --nbmake-kernel=python3 --nbmake-timeout=900

lint: install
	$(BIN)/ruff check .

notebooks: install
	$(BIN)/python tests/notebook_tools.py run $(NB)

soak: install
	$(TESTENV) $(BIN)/python tests/soak.py
	$(TESTENV) PROPERTY_EXAMPLES=500 $(BIN)/python -m pytest -q -n $(JOBS) tests/test_properties.py -k test_property

stale: install
	@$(BIN)/python tests/notebook_tools.py stale

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with venv is needed: name one with make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing requirements.txt into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) out
