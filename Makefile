# Every target does its own set-up. On Debian as root the missing packages are installed; otherwise you are told which.
PYTHON ?= python3
SEED ?= 1

# nft and ip live in sbin, which is not on everybody's PATH.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin
export PYTHON
unexport PYTHONHOME

VENV := .venv/bin
SOURCES := $(CURDIR)/policy:$(CURDIR)/proxy:$(CURDIR)/operator:$(CURDIR)/cli
UNCOMPILED := PELLUCID_FORM=uncompiled PYTHONPATH=$(SOURCES)
# The path of the compiled form, which is made first where it is out of date.
COMPILE := compiled=$$($(VENV)/python tools/build_compiled.py)
COMPILED := PELLUCID_FORM=compiled PYTHONPATH=$$compiled

.DEFAULT_GOAL := help
.PHONY: help demo test lint format engine bench bench-handover soak manifests e2e e2e-up e2e-down fuzz fuzz-short lock clean setup setup-e2e setup-python

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: setup  ## pods, a node and servers in namespaces; policies at work, changed under traffic (a minute)
	@$(COMPILE) && $(COMPILED) $(VENV)/python -m pellucid_cli.demo

test: setup  ## the whole suite on the sources, then all that runs the engine on the compiled form
	@echo "== uncompiled form"
	@$(UNCOMPILED) $(VENV)/python -m pytest tests $(ARGS)
	@echo "== compiled form"
	@$(COMPILE) && $(COMPILED) $(VENV)/python -m pytest $(wildcard tests/policy tests/proxy tests/netns tests/cli) $(ARGS)

lint: setup-python  ## style, types, import contracts
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/mypy
	@PYTHONPATH=$(SOURCES) $(VENV)/lint-imports

format: setup-python  ## rewrite the sources in the project's style
	@$(VENV)/ruff check --fix-only .
	@$(VENV)/ruff format .

engine: setup  ## the compiled form, under build/compiled/current
	@$(VENV)/python tools/build_compiled.py

bench: setup  ## side by side with HAProxy, nginx, Envoy, Squid and mitmproxy; prints the ratios
	@$(COMPILE) && $(COMPILED) $(VENV)/python -m bench.run $(ARGS)

bench-handover: setup  ## hand-overs at full load: connections lost, streams cut
	@$(COMPILE) && $(COMPILED) $(VENV)/python -m bench.handover $(ARGS)

CLUSTER := $(VENV)/python -m e2e.cluster $(if $(WORKERS),--workers $(WORKERS)) $(if $(PROXY_MODE),--proxy-mode $(PROXY_MODE))

e2e: e2e-up  ## a real Kubernetes on this machine, its tests, and away with it; WORKERS=3, PROXY_MODE=iptables
	@status=0; PYTHONPATH=$(SOURCES) $(VENV)/python -m pytest e2e $(ARGS) || status=$$?; $(CLUSTER) down; exit $$status

e2e-up: setup-e2e  ## the cluster alone, for trying things: python3 -m e2e.cluster kubectl …
	@$(CLUSTER) up

e2e-down:  ## away with it
	@$(CLUSTER) down

soak: setup  ## a million connections while pods and policies change: nothing of them is left, each is accounted for (minutes)
	@$(COMPILE) && $(COMPILED) $(VENV)/python -m tests.soak $(ARGS)

fuzz: setup  ## every parser on mutated input, by coverage on the sources and blindly on the compiled form; ARGS='--executions 1000000'
	@tools/setup.sh fuzz
	@$(UNCOMPILED):$(CURDIR)/build/fuzz/atheris $(VENV)/python -m fuzz.run --target all --seed $(SEED) $(ARGS)
	@$(COMPILE) && $(COMPILED) $(VENV)/python -m fuzz.run --target all --seed $(SEED) $(ARGS) --engine own

fuzz-short: setup-python  ## a short run of fixed length, for every change
	@$(UNCOMPILED) $(VENV)/python -m fuzz.run --target all --executions 20000 --seed $(SEED) --engine own

manifests: setup-e2e  ## manifests/install.yaml from the chart, for those who do not use helm
	@$(VENV)/python -m tools.manifests

lock:  ## requirements.lock from pyproject.toml; ARGS=--upgrade for the newest versions
	@$(PYTHON) -m venv build/lock && build/lock/bin/pip install --quiet uv
	@build/lock/bin/uv pip compile --quiet pyproject.toml --extra operator --extra dev --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" -o requirements.lock $(ARGS)
	@build/lock/bin/uv pip compile --quiet pyproject.toml --extra operator --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" -c requirements.lock -o requirements-image.lock $(ARGS)
	@build/lock/bin/uv pip compile --quiet fuzz/requirements.in --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" -o fuzz/requirements.lock $(ARGS)

clean:  ## everything that was made
	rm -rf .venv .bench build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup:
	@tools/setup.sh system

setup-e2e:
	@tools/setup.sh e2e

setup-python:
	@tools/setup.sh
