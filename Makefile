# Every target sets up what it needs, once: an environment is rebuilt only when its lock in requirements/ changes.
#   make recommend [ARGS="--model 8b --gpus 2xL40S"]     make test     make app     make help

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

ARGS ?= --model 70b --gpus 8xA100
TEST_ARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet
BASE := $(VENV)/.base.stamp
APP := $(VENV)/.app.stamp
DEV := $(VENV)/.dev.stamp

ENGINES_VENV := .venv-engines
ENGINES_BIN := $(ENGINES_VENV)/bin
ENGINES := $(ENGINES_VENV)/.engines.stamp

# The first interpreter that is new enough and can make environments; PYTHON=... overrides the list.
PYTHON ?= python3 python3.12 python3.13 python3.11 python3.14 python
define make_venv
@for p in $(PYTHON); do \
  if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
    echo "Creating $(1) with $$("$$p" -V), once." >&2; exec "$$p" -m venv $(1); \
  fi; \
done; \
echo "advisor needs Python 3.11 or newer with its venv module (Debian and Ubuntu: apt-get install python3-venv); looked for: $(PYTHON)." >&2; \
exit 1
endef

.PHONY: help
help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{ printf "make %-13s %s\n", $$1, $$2 }'

$(VENV)/pyvenv.cfg:
	$(call make_venv,$(VENV))

$(BASE): requirements/base.txt pyproject.toml | $(VENV)/pyvenv.cfg
	@echo "Installing $< into $(VENV), once." >&2
	@$(PIP) install --no-deps -r requirements/base.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@$(BIN)/python -m compileall -q advisor
	@touch $@

$(APP): requirements/app.txt $(BASE)
	@echo "Installing $< into $(VENV), once." >&2
	@$(PIP) install --no-deps -r requirements/app.txt
	@touch $@

$(DEV): requirements/dev.txt $(APP)
	@echo "Installing $< into $(VENV), once." >&2
	@$(PIP) install --no-deps -r requirements/dev.txt
	@touch $@

.PHONY: recommend
recommend: $(BASE) ## recommend a deployment; ARGS="--model 70b --gpus 8xA100" by default
	@$(BIN)/advisor recommend $(ARGS)

.PHONY: app
app: $(APP) ## start the web app on this machine
	@$(BIN)/python -m streamlit run app.py

.PHONY: test
test: lint ## lint, then every test that needs no GPU and no engine
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

.PHONY: lint
lint: $(DEV) ## ruff, mypy --strict, the import rules
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

.PHONY: format
format: $(DEV) ## rewrite the sources as `make lint` wants them
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

.PHONY: bench
bench: $(DEV) ## print how long the main calls take, as ratios and times; asserts nothing
	@$(BIN)/python -m benchmarks

.PHONY: docs
docs: $(DEV) ## regenerate what follows from the code and the fit: docs/cli.md, docs/accuracy.md, the README's example
	@$(BIN)/python scripts/gen_cli_docs.py
	@$(BIN)/python scripts/gen_accuracy.py
	@$(BIN)/python scripts/gen_example.py

$(ENGINES_VENV)/pyvenv.cfg:
	$(call make_venv,$(ENGINES_VENV))

$(ENGINES): requirements/engines.txt pyproject.toml | $(ENGINES_VENV)/pyvenv.cfg
	@echo "Installing vLLM and DeepSpeed into $(ENGINES_VENV): several GB, once." >&2
	@$(ENGINES_BIN)/python -m pip --disable-pip-version-check --no-input install --no-deps -r requirements/engines.txt
	@$(ENGINES_BIN)/python -m pip --disable-pip-version-check --no-input --quiet install --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: test-engines
test-engines: $(ENGINES) ## check what we emit with the real vLLM and DeepSpeed parsers, on the CPU
	$(ENGINES_BIN)/python -m pytest -m engines tests/engines $(TEST_ARGS)

PEERS_VENV := .venv-peers
PEERS := $(PEERS_VENV)/.peers.stamp

$(PEERS_VENV)/pyvenv.cfg:
	$(call make_venv,$(PEERS_VENV))

$(PEERS): requirements/peers.txt | $(PEERS_VENV)/pyvenv.cfg
	@echo "Installing another predictor into $(PEERS_VENV): about 1 GB, once." >&2
	@$(PEERS_VENV)/bin/python -m pip --disable-pip-version-check --no-input --quiet install --no-deps -r requirements/peers.txt
	@touch $@

RUNS ?= $(wildcard data/runs/vllm-*.jsonl)

.PHONY: peers
peers: $(DEV) $(PEERS) ## compare our errors with another predictor's on the same measured runs
	@$(BIN)/python benchmarks/peers_aiconfigurator.py --peer-python $(PEERS_VENV)/bin/python --out data/peers/aiconfigurator.json $(RUNS)

UV_LOCK = uv pip compile --quiet --generate-hashes --no-header --annotation-style line --python-version 3.11

.PHONY: lock
lock: ## re-lock requirements/*.txt (needs uv; add UPGRADE=--upgrade for newer releases)
	$(UV_LOCK) $(UPGRADE) --universal pyproject.toml requirements/build.in -o requirements/base.txt
	$(UV_LOCK) $(UPGRADE) --universal pyproject.toml requirements/build.in --extra app -c requirements/base.txt -o requirements/app.txt
	$(UV_LOCK) $(UPGRADE) --universal pyproject.toml requirements/build.in --extra app --extra verify --extra study --extra dev -c requirements/app.txt -o requirements/dev.txt
	$(UV_LOCK) $(UPGRADE) --python-platform x86_64-manylinux_2_28 pyproject.toml requirements/build.in requirements/engines.in -o requirements/engines.txt
	$(UV_LOCK) $(UPGRADE) --python-platform x86_64-manylinux_2_28 requirements/peers.in -o requirements/peers.txt

.PHONY: clean
clean: ## remove the environments and caches
	rm -rf $(VENV) $(ENGINES_VENV) $(PEERS_VENV) build dist advisor.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
