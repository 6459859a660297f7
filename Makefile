# The only door: newcomers, developers and CI all come through here. `make help` lists the targets.

PYTHON ?= python3
BIN := .venv/bin
UV := 0.13.9

.PHONY: help demo test slow sim mutants check style types e2e catalogue sdk bench certify jaeger jaeger-run lock clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: .venv/ready ## rehearse 9 December 2020 on a cluster of six nodes
	@$(BIN)/canary rehearse 2020-12-09

test: .venv/ready ## the tests a newcomer runs: no root, loopback only
	@$(BIN)/pytest -q -n 2 --dist loadscope -m "not e2e and not sdk and not bench and not slow and not catalogue"

slow: .venv/ready ## every fault that the cluster can play does what it says
	@$(BIN)/pytest -q -m slow

sim: .venv/ready ## the whole fleet in virtual time: a thousand hours of it, SEEDS=n lives, or SEED=n to play one again
	@$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),34))

mutants: .venv/ready ## ten planted bugs, each of which the tests must catch
	@$(BIN)/python tools/mutants.py

check: style types test ## what must hold before a commit

style: .venv/ready ## lint and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: .venv/ready ## strict types
	@$(BIN)/mypy

e2e: .venv/ready ## rehearsals on the real cluster, traces in the real Jaeger
	@$(BIN)/pytest -q -m e2e

catalogue: .venv/ready ## every fault on real clusters: what was played against what was said
	@$(BIN)/pytest -q -s -m catalogue

sdk: .venv/ready ## the official Stream Chat SDKs, unmodified, against the cluster
	@$(BIN)/pytest -q -m sdk

bench: .venv/ready ## measured figures beside their bars
	@CANARY_BENCH=full $(BIN)/pytest -q -s -m bench

certify: .venv/ready ## the acceptance bars of the detector, measured in full; one bar: make certify CASE=15 SEED=3
	@$(BIN)/python -m tests.bench.certify $(if $(CASE),--case $(CASE)) $(if $(SEED),--seed $(SEED))

jaeger: .venv/ready ## build and run the real Jaeger on loopback: http://127.0.0.1:16686
	@$(BIN)/python tools/jaeger.py run

lock: .venv/ready ## renew requirements.lock from pyproject.toml
	@$(BIN)/uv pip compile -q --upgrade --all-extras --generate-hashes --no-header --no-emit-index-url pyproject.toml -o requirements.lock

clean:           ## remove what the targets made
	@rm -rf .venv .jaeger .mypy_cache .pytest_cache .ruff_cache .hypothesis tests/sdk/node_modules

# uv installs the locked set in a third of the time pip takes; every wheel is checked against its hash.
.venv/ready: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed; name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "venv is missing: apt-get install python3-venv"; exit 1; }
	@echo "installing into .venv"
	@$(PYTHON) -m venv .venv && $(BIN)/pip install -q --disable-pip-version-check uv==$(UV)
	@$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@
