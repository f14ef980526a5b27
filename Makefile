# `make demo` and `make test` need only Python 3.11+ and make: they make their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests compute on small tensors: a process for each core beats one process with all threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-browser browser test-netns netns docs lint format bench clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "poa needs Python 3.11 or newer; set PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

setup: $(READY) ## Make the environment in .venv (a few minutes the first time).

demo: $(READY) ## Pre-train on handwritten digits, evaluate every sub-network, extract one. Results in poa-demo/.
	$(BIN)/poa demo --out poa-demo

test: $(READY) ## Run the test suite (without the slow tests).
	$(PYTEST)

test-slow: $(READY) ## Run the slow tests only.
	$(PYTEST) -m slow

test-browser: $(READY) ## Run the tests of the report's page in Chromium (`make browser` installs it on Debian).
	POA_REQUIRE_BROWSER=1 $(BIN)/python -m pytest -m "slow or not slow" tests/integration/test_report_browser.py

browser: ## Install Chromium and its driver, where they are not, with Debian's package manager (as root).
	{ command -v chromium && command -v chromedriver; } >/dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver; }

test-netns: $(READY) ## Run two hosts in network namespaces (as root; `make netns` installs what they need on Debian).
	POA_REQUIRE_NETNS=1 $(BIN)/python -m pytest -m slow tests/integration/test_hosts.py

netns: ## Install `ip`, where it is not, with Debian's package manager (as root).
	command -v ip >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq iproute2; }

docs: $(READY) ## Build the documentation into site/; a broken link is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(READY) ## Check style, types, imports and budgets.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_budgets.py

format: $(READY) ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## Measure one training step against a matrix product on this machine.
	$(BIN)/python benchmarks/step.py

clean: ## Remove the environment and all caches.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache poa-demo site
