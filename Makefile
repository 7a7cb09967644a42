# What one does with this tree. `make` prints the list; each target makes its own environment first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
export PYTHON

BIN := .venv/bin
RUN := .venv/.installed-run
DEV := .venv/.installed-dev
SECONDS ?= 600
SEEDS ?= all
TIER := bash .ci/tier
# What pytest has compiled is kept, whatever the environment says: to do it anew takes each worker half of its start.
PYTEST := env --unset=PYTHONDONTWRITEBYTECODE $(BIN)/pytest

.PHONY: help run check lint layers types test test-rooms test-processes test-system test-deep simulate simulate-mutants torture powercut powercut-real demo reference bench lock clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(RUN) ## install what the daemon needs, then serve ./data in the foreground
	@echo 'make: to connect, run .venv/bin/python here and open AppointmentsDBM("data"), or the address below; Ctrl-C ends it'
	@exec $(BIN)/dbmd serve ./data

check: $(DEV) ## lint, types and the layers: the quick one
	@$(TIER) 'make check' 120 $(MAKE) --keep-going lint layers types

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

layers: $(DEV)
	$(BIN)/lint-imports

types: $(DEV)
	$(BIN)/mypy
	$(BIN)/basedpyright

test: $(DEV) ## the tests: no root, no system packages; every pure room covered by its own
	@$(TIER) 'make test' 180 $(MAKE) --jobs=2 test-rooms test-processes

test-rooms: # in one process, where their coverage is measured; told at its end, for beside it the processes tell theirs
	@told=$$($(PYTEST) -q -m room -p tests.rooms_covered 2>&1) || status=$$?; echo "$$told"; exit "$${status:-0}"

test-processes: # most of these wait for daemons and clients, so more of them run at once than there are cores
	$(PYTEST) -q -m 'not room and not system and not deep' --numprocesses=4 --session-timeout=360

test-system: $(DEV) ## what needs system packages, root, empty environments, processes by the dozen, or half a minute
	@$(TIER) 'make test-system' 1200 $(BIN)/pytest -m system --timeout=600

test-deep: $(DEV) ## the long search: SECONDS=600, SEEDS=all or committed
	@$(TIER) 'make test-deep' $$(( $(SECONDS) + $(SECONDS) / 5 + 300 )) \
		$(BIN)/pytest -m deep --hypothesis-profile=deep --timeout=0 --deep-seconds=$(SECONDS) --deep-seeds=$(SEEDS)

simulate: $(DEV) ## the core under every fault, 20,000 seeds of a simulated world
	@$(TIER) 'make simulate' 600 $(BIN)/python -m tests.simulation --seeds 20000

simulate-mutants: $(DEV) ## break one line at a time: the simulation finds each
	@$(TIER) 'make simulate-mutants' 240 $(BIN)/python -m tests.simulation --mutants

torture: $(DEV) ## 100 kills of a real daemon under 8 clients: nothing lost, doubled or told wrongly
	@$(TIER) 'make torture' 600 $(BIN)/python -m tests.torture

powercut: $(DEV) ## 200 power cuts under load, on ext4 and on strict POSIX
	@$(TIER) 'make powercut' 300 $(BIN)/python -m tests.powercut

powercut-real: $(DEV) ## 200 power cuts of a disk under ext4, XFS and btrfs each, which are mounted again; as root
	@$(TIER) 'make powercut-real' 600 $(BIN)/python -m tests.powercut --real

demo: $(RUN) ## four towers on one database, in half a minute
	@$(BIN)/python -m tests.demo

reference: $(RUN) ## write docs/operations.md anew from the registry
	@$(BIN)/python -m tests.reference

bench: $(DEV) ## the speed of dbmd beside its alternatives, on this machine; writes it into README and docs
	@$(BIN)/python -m tests.benchmarks --write

lock: $(DEV) ## pin every dependency anew
	@bash .ci/lock

clean: ## remove what these targets made; ./data stays
	rm -rf .venv .venvs build dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(RUN): requirements.lock pyproject.toml .ci/environment
	@bash .ci/environment run

$(DEV): requirements.lock pyproject.toml .ci/environment
	@bash .ci/environment dev
