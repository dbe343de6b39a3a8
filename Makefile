# Everything a checkout needs, from Python >= 3.11 alone (and npm for `lint`, `proto-check` and `node-check`).
# Stamps remember what is installed: a target reinstalls only when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
ARGS ?=
BUF_VERSION := 1.75.0
# The oldest protobuf that the SDK runs on decides the generator: newer ones' output runs on their own protobuf only.
# It finds its own protos through pkg_resources, which setuptools 80 no longer brings everywhere.
PROTO_TOOLS := grpcio-tools==1.62.3 grpcio==1.62.3 protobuf==4.25.9 'setuptools<80'

VENV := .venv
BIN := $(VENV)/bin
BUF := .tools/node_modules/.bin/buf
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
NPM := npm install --no-save --no-package-lock --no-audit --no-fund --loglevel=error
TYPED := $(wildcard client/patchclamp server/patchclamp_server tests benchmarks)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint format protos proto-check proto-publish node-check bench gpu-check constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.server ## start the bundled model and take the guided tour (ARGS=--short for the short one)
	$(BIN)/patchclamp demo $(ARGS)

test: $(VENV)/.dev ## run the tests (ARGS="-k receipts" to choose)
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev $(BUF) ## ruff, mypy and buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)
	$(BUF) lint protos

format: $(VENV)/.dev ## put imports in order and format the code
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

protos: .venv-protos/.installed ## generate the Python stubs from the protos
	.venv-protos/bin/python protos/generate.py

proto-check: .venv-protos/.installed $(BUF) ## fail when stubs are stale or the protos break the published contract
	.venv-protos/bin/python protos/generate.py --check
	@test -f protos/published.binpb || { echo "protos/published.binpb is missing: make proto-publish writes it" >&2; exit 1; }
	$(BUF) breaking protos --against protos/published.binpb

proto-publish: $(BUF) ## make the protos as they are the contract that proto-check holds them to
	$(BUF) build protos --exclude-source-info -o protos/published.binpb

node-check: $(VENV)/.server tests/node/node_modules/.installed ## call the server from Node and compare with the SDK
	$(BIN)/python tests/node/check.py

bench: $(VENV)/.server ## run the benchmarks (ARGS are theirs)
	OMP_NUM_THREADS=1 THP_MEM_ALLOC_ENABLE=1 $(BIN)/python -m benchmarks $(ARGS)

# On a machine that has its packages already, name its Python: make gpu-check GPU_PYTHON=python3. The settings that
# belong to plugins it may lack are dropped then.
gpu-check: $(if $(GPU_PYTHON),,$(VENV)/.dev) ## run the engine's tests on a CUDA device
	$(or $(GPU_PYTHON),$(BIN)/python) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no CUDA device")'
	PYTHONPATH=client:server $(or $(GPU_PYTHON),$(BIN)/python) -m pytest \
		$(if $(GPU_PYTHON),-o addopts=--import-mode=importlib -o filterwarnings=default) -m "" --device cuda tests/engine $(ARGS)

constraints: ## resolve every dependency anew and pin it (torch stays where it is pinned)
	rm -rf .venv-constraints
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip --disable-pip-version-check install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv-constraints/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[server,dev]'
	{ sed '/^[^#]/,$$d' constraints.txt; .venv-constraints/bin/python -m pip freeze --all --exclude pip --exclude-editable \
		| sed 's/+.*//'; } > .venv-constraints/constraints.txt
	mv .venv-constraints/constraints.txt constraints.txt
	rm -rf .venv-constraints

clean: ## remove what the Makefile installed and every cache
	rm -rf $(VENV) .venv-* .tools build dist tests/node/node_modules
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find client server tests protos $(wildcard benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, from its pin: left to the resolver it may become the newest build with its gigabytes of CUDA.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "patchclamp needs Python >= 3.11: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/.server: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) --editable '.[server]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) --editable '.[server,dev]'
	@touch $(VENV)/.server $@

.venv-protos/.installed: Makefile
	rm -rf .venv-protos
	$(PYTHON) -m venv .venv-protos
	.venv-protos/bin/python -m pip --disable-pip-version-check install --quiet $(PROTO_TOOLS)
	@touch $@

.PHONY: npm
npm:
	@command -v npm > /dev/null || { echo "npm is missing: this check needs Node.js >= 20.15 with npm" >&2; exit 1; }

$(BUF): Makefile | npm
	$(NPM) --prefix .tools @bufbuild/buf@$(BUF_VERSION)
	@touch $@

tests/node/node_modules/.installed: tests/node/package.json | npm
	$(NPM) --prefix tests/node
	@touch $@
