# Everything a newcomer needs: `make test`. Set PYTHON to choose an interpreter, VENV to put it elsewhere.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install lint format docs test tools containers demo clean

help: ## Show the targets.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## Install into $(VENV).

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

lint: $(STAMP) ## Check format, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## Format, and fix what can be fixed.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP) ## Build the documentation into build/site; a broken link or anchor is an error.
	$(BIN)/sphinx-build -q -E -W --keep-going -c docs -d build/doctrees . build/site

demo: $(STAMP) ## Start everything here, make a picture (demo.png), and serve until Ctrl-C; EXIT=1 stops after it.
	$(BIN)/guided demo $(if $(EXIT),--exit)

tools: $(STAMP) ## Find a C++ compiler and a browser for the tests, or install them.
	tests/install.sh $(BIN)

test: lint tools ## Lint, then run all tests.
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist worksteal

containers: $(STAMP) ## Build the image and run the compose file, without Docker (Debian, as root).
	$(BIN)/pip install --quiet -c constraints.txt -e '.[deploy]'
	VENV=$(VENV) deploy/check.sh

clean: ## Remove what the targets made.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
