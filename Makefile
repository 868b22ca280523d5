# Every target that needs Python makes the virtual environment first, and again when its pins changed.
SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := $(VENV)/install.log
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input -q -c constraints.txt
BENCHES ?= packing matching queue pipeline
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
ARGS ?=
MINUTES ?= 20
SEED ?= 0
# test files at a time
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q
IN_WORKERS := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
WARM_RUN := runs/warm-start-scenes
WARM_CONFIG := configs/warm_start/scenes.yaml
SETTLE_RUN := runs/warm-start-settle
SETTLE_CONFIG := configs/warm_start/scenes_settle.yaml

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-vllm check torture up down bench requirements assets clean

help:
	@echo "make demo            the main job, from nothing to a report (ARGS='--steps 48')"
	@echo "make test            all tests, two files at a time (WORKERS=4, ARGS='-k packing')"
	@echo "make test-fast       the unit tests alone"
	@echo "make test-vllm       the tests on real vLLM servers; installs them apart (about 6 GB)"
	@echo "make check           formatter, linter, types, house rules"
	@echo "make torture         the queue under kills, freezes, lost replies, full memory (MINUTES=20 SEED=0)"
	@echo "make up              the whole stack in containers, dashboards at http://localhost:3000 (CONFIG=…)"
	@echo "make down            stop them; their volumes stay"
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
	@$(PYTEST) $(IN_WORKERS) $(ARGS)

test-fast: $(STAMP)
	@$(PYTEST) $(IN_WORKERS) tests/unit $(ARGS)

test-vllm: $(STAMP)
	@bash scripts/install_vllm.sh
	@ROLLSTREAM_TEST_VLLM=1 $(PYTEST) tests/vllm $(ARGS)

check: $(STAMP)
	@$(BIN)/ruff format --check --output-format concise .
	@$(BIN)/ruff check --output-format concise .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/unit/test_house_*.py tests/unit/test_error_map.py tests/unit/test_reasons.py

# half of the minutes on each durability; status 1 says that a rollout was lost, stuck or trained twice, or that
# something grows. Gauges over time and the roles' log stay in runs/torture-<seed>
torture: $(STAMP)
	@MINUTES=$(MINUTES) SEED=$(SEED) OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture

# CONFIG is the run that the containers make; REDIS_PASSWORD and the other variables of the compose file pass through
up:
	@$(COMPOSE) ps >/dev/null 2>&1 || { echo "make up: no running Docker engine with compose here; without it: rollstream up CONFIG"; exit 2; }
	@$(if $(CONFIG),RUN_CONFIG=$(CONFIG)) $(COMPOSE) up --build --detach $(ARGS)
	@echo "dashboards: http://localhost:$${GRAFANA_PORT:-3000}   queries: http://localhost:$${PROMETHEUS_PORT:-9090}"
	@echo "health: $(COMPOSE) ps   logs: $(COMPOSE) logs -f learner   stop: make down"

# volumes stay, so the next make up goes on with the run; ARGS=--volumes forgets it
down:
	@$(COMPOSE) down $(ARGS)

bench: $(STAMP)
	@set -e; for bench in $(BENCHES); do OMP_NUM_THREADS=1 $(BIN)/rollstream bench $$bench $(ARGS); done

requirements: $(STAMP)
	@$(BIN)/python -m tests.requirements_table

# the commands are kept beside the checkpoint, in trained.json
assets: $(STAMP)
	@for run in $(WARM_RUN) $(SETTLE_RUN); do test ! -e $$run || \
	  { echo "make assets: $$run exists; move it away to train from the start"; exit 2; }; done
	@set -e; commands=("rollstream data scenes data/scenes" "rollstream model tiny models/scenes_tiny" \
	  "rollstream learn $(WARM_CONFIG) --set training.early_stop.target=0.6" \
	  "rollstream model export $(WARM_RUN) models/scenes_warm --dtype float32" \
	  "rollstream data scenes data/scenes_large --num-train 16000" "rollstream learn $(SETTLE_CONFIG)"); \
	for command in "$${commands[@]}"; do echo "$$command"; $(BIN)/$$command; done; \
	$(BIN)/python -m rollstream.models.shipped_checkpoint $(SETTLE_CONFIG) rollstream/assets/scenes_tiny "$${commands[@]}"

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -print0 | xargs -0r rm -rf
