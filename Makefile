# Every target sets up what it needs, says what it does, and is fast when there is nothing left to do.

# The first interpreter that is new enough; `make PYTHON=...` names another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
# Tools built into .cache/bin (grpcurl) are found by the tests that use them.
WITH_TOOLS := PATH="$(CURDIR)/.cache/bin:$$PATH"
PYTEST_ARGS ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup tools run test test-slow machine check lint types imports protos fmt gen gen-check lock bench chaos \
	clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: setup ## Serve a tiny model, load it, stream an answer, and stay up until Ctrl-C.
	@$(BIN)/python scripts/run_demo.py $(ARGS)

test: setup tools check ## Everything CI checks: lint, types, imports, protos, and the tests.
	@echo "paddock: running the tests"
	@$(WITH_TOOLS) $(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: setup tools ## The tests that take long.
	@$(WITH_TOOLS) $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

machine: setup ## The manager's rules under a million random steps of callers, workers and the clock.
	@PADDOCK_MACHINE_EXAMPLES=$${PADDOCK_MACHINE_EXAMPLES:-20000} $(BIN)/python -m pytest --timeout=0 -o faulthandler_timeout=0 \
		tests/unit/test_manager_machine.py

check: lint types imports protos ## Every check but the tests.

setup: ## Make .venv, compile llama.cpp, install everything (CMAKE_ARGS passes through).
	@if [ -z "$(PYTHON)" ]; then echo "paddock: error: no Python 3.11 or newer was found; install one" \
		"(https://www.python.org/downloads/) or name it: make PYTHON=/path/to/python3" >&2; exit 1; fi
	@$(PYTHON) scripts/bootstrap.py

tools: setup ## Build grpcurl into .cache/bin, where Go is installed.
	@$(BIN)/python scripts/tools.py

lint: setup
	@echo "paddock: checking style and spelling"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check . || (echo "paddock: error: \`make fmt\` formats them" >&2; exit 1)
	@$(BIN)/codespell

types: setup
	@echo "paddock: checking types"
	@$(BIN)/basedpyright --project .

imports: setup
	@echo "paddock: checking which part imports which"
	@$(BIN)/lint-imports --no-logo

protos: setup
	@$(BIN)/python scripts/check_protos.py

gen-check: setup ## Check that generating the stubs again changes nothing.
	@$(BIN)/python scripts/gen_protos.py --check

gen: setup ## Generate the Python stubs, and the Go stubs where Go is installed.
	@$(BIN)/python scripts/gen_protos.py

fmt: setup ## Format Python and protos, and fix what can be fixed.
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format --quiet .
	@$(BIN)/buf format --write

# Says its seed when it fails; `make chaos ROUNDS=n SEED=s` repeats it.
chaos: setup ## Many rounds of killing, stalling and filling disks (ROUNDS=n, SEED=s).
	@PADDOCK_CHAOS_ROUNDS=$(ROUNDS) PADDOCK_CHAOS_SEED=$(SEED) $(BIN)/python -m pytest -m slow tests/chaos \
		-o log_cli=true -o log_cli_level=INFO -o faulthandler_timeout=0 $(PYTEST_ARGS)

bench: setup ## Measure throughput, latency and memory.
	@$(BIN)/python -m bench $(ARGS)

# Keeps pins that still fit; `make lock UPGRADE=1` takes the newest of everything.
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-annotate --no-emit-index-url --no-emit-find-links $(if $(UPGRADE),--upgrade)
lock: setup ## Write constraints.txt and constraints-gen.txt from pyproject.toml.
	@$(LOCK) pyproject.toml --all-extras --group dev --output-file constraints.txt >/dev/null
	@$(LOCK) --group gen --output-file constraints-gen.txt >/dev/null

clean: ## Remove everything that was made here (compiled llama.cpp stays in the user's cache).
	@rm -rf .venv .cache build dist
