# Every target that needs Python makes the virtual environment first, and again when its pins changed.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := $(VENV)/install.log
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input -q -c constraints.txt
BENCHES ?= packing matching queue
ARGS ?=
WARM_RUN := runs/warm-start-scenes
WARM_CONFIG := configs/warm_start/scenes.yaml

.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm check up down bench requirements assets clean

help:
	@echo "make demo            the main job, from nothing to a report (ARGS='--steps 48')"
	@echo "make test            all tests (ARGS='-k packing')"
	@echo "make test-vllm       the tests on real vLLM servers; installs them apart (about 6 GB)"
	@echo "make check           formatter, linter, types, house rules"
	@echo "make up CONFIG=…     the whole stack on this machine"
	@echo "make down RUN=…      stop the stack of a run folder (runs/<name>)"
	@echo "make bench           the budgets of docs/DESIGN.md (BENCHES='packing')"
	@echo "make requirements    each requirement with the tests that prove it"
	@echo "make assets          train the shipped checkpoint again"
	@echo "make clean           remove caches; keeps data, models, runs and the environment"

$(STAMP): constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no python3 on the PATH, expected Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is $$($(PYTHON) --version), expected 3.11 or newer; say make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "make: $(PYTHON) cannot make a virtual environment; install its venv package (Debian: python3-venv)"; exit 1; }
	@echo "installing into $(VENV): some minutes the first time; pip writes to $(LOG)"
	@{ $(PIP_INSTALL) torch && $(PIP_INSTALL) -e '.[local,dev]'; } >$(LOG) 2>&1 || \
	  { tail -n 20 $(LOG); echo "make: pip failed, see $(LOG); make tries again where it stopped"; exit 1; }
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/rollstream demo $(ARGS)

test: $(STAMP)
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q $(ARGS)

test-vllm: $(STAMP)
	@bash scripts/install_vllm.sh
	@ROLLSTREAM_TEST_VLLM=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	  $(BIN)/python -m pytest -q tests/vllm $(ARGS)

check: $(STAMP)
	@$(BIN)/ruff format --check --output-format concise .
	@$(BIN)/ruff check --output-format concise .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/unit/test_house_rules.py tests/unit/test_house_documents.py tests/unit/test_error_map.py

up: $(STAMP)
	@test -n "$(CONFIG)" || { echo "make up: which run? say make up CONFIG=configs/demo.yaml"; exit 2; }
	@$(BIN)/rollstream up $(CONFIG) $(ARGS)

# the kernel holds the lock for as long as the stack lives, so a stale file stops nothing
down:
	@test -n "$(RUN)" || { echo "make down: which run? say make down RUN=runs/<name>"; exit 2; }
	@test -d "$(RUN)" || { echo "make down: no folder $(RUN); give the folder of a run (runs/<name>)"; exit 2; }
	@lock="$(RUN)/stack.lock"; \
	if [ ! -e "$$lock" ] || flock -n "$$lock" true; then echo "$(RUN): no stack is running"; exit 0; fi; \
	pid=$$(cat "$$lock"); echo "$(RUN): stopping the stack, process $$pid"; kill -TERM "$$pid"; \
	flock -w 90 "$$lock" true || { echo "$(RUN): process $$pid still runs after 90 s; kill -TERM $$pid again ends it at once"; exit 1; }; \
	echo "$(RUN): stopped; the same rollstream up goes on with it"

bench: $(STAMP)
	@set -e; for bench in $(BENCHES); do OMP_NUM_THREADS=1 $(BIN)/rollstream bench $$bench $(ARGS); done

requirements: $(STAMP)
	@$(BIN)/python -m tests.requirements_table

# the commands are kept beside the checkpoint, in trained.json
assets: $(STAMP)
	@test ! -e $(WARM_RUN) || { echo "make assets: $(WARM_RUN) exists; move it away to train from the start"; exit 2; }
	@set -e; commands=("rollstream data scenes data/scenes" "rollstream model tiny models/scenes_tiny" \
	  "rollstream learn $(WARM_CONFIG)"); \
	for command in "$${commands[@]}"; do echo "$$command"; $(BIN)/$$command; done; \
	$(BIN)/python -m rollstream.shipped_checkpoint $(WARM_CONFIG) rollstream/assets/scenes_tiny "$${commands[@]}"

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -print0 | xargs -0r rm -rf
