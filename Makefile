# Everything that people and CI run. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
CARGO ?= cargo
HOST := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
PENSTOCK := target/$(HOST)/debug/penstock
export PENSTOCK_BIN := $(CURDIR)/$(PENSTOCK)

.PHONY: help up build test smoke e2e prove kind kind-down bench-proxy bench-balance faults ledger bench-ledger crds fmt lint

help: ## This list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build:
	@tools/need cargo cc
	@tools/heartbeat build $(CARGO) build -p penstock

up: build ## Everything on this machine, without a cluster: gateway, scaler, simulated engines (Ctrl-C stops it)
	@exec $(PENSTOCK) up -f examples/quickstart $(ARGS)

test: ## What CI runs: fmt, clippy, tests, smoke, e2e stories
	@tools/need cargo cc python3
	@tools/test

smoke: build ## The embedded default, with the openai SDK and a ramp that makes the pool grow and shrink
	@tools/need python3
	@e2e/smoke

e2e: build ## User stories on a cluster: STORY=name for one, KUBECONFIG=… for your own cluster
	@tools/need python3
	@e2e/run $(STORY)

prove: build ## Long stories and benchmarks; resumable; figures go to docs/performance.md
	@tools/need python3
	@tools/prove

kind: ## A kind cluster with KEDA and metrics-server
	@e2e/kind/up && e2e/kind/keda && e2e/kind/metrics-server

kind-down: ## Takes the kind cluster away
	@e2e/kind/down

bench-proxy: ## CPU, latency, throughput, memory beside Envoy, nginx, vllm-router, sglang-router, LiteLLM, Portkey (30 min; QUICK=1: 7)
	@tools/need cargo cc python3
	@bench/proxy/run

bench-balance: build ## Balancing strategies side by side: time to first token and answers per second (12 min)
	@tools/need python3
	@bench/balance/run

ledger: build ## Budgets under deaths, losses and clocks that are set: 10,000 simulated runs, 1,000 real ones (70 min)
	@tools/need cargo cc python3
	@tools/redis
	@bench/ledger/prove

bench-ledger: ## What keys, tokens and hard budgets cost a request, and what their store does to the slowest (8 min)
	@tools/need cargo cc python3 openssl
	@tools/redis
	@bench/ledger/run

faults: build ## Faults and abuse, graded, beside LiteLLM, Portkey, vllm-router and Envoy (under 40 min; CASE=… and SUBJECTS=… narrow it)
	@tools/need python3
	@bench/faults/run

crds: build ## Writes the CustomResourceDefinitions again after a change of the kinds
	@$(PENSTOCK) crds --out crds/yaml && $(PENSTOCK) crds --out charts/penstock/crds

fmt: ## Formats all code
	@$(CARGO) fmt --all

lint: ## Clippy as CI runs it
	@$(CARGO) clippy --workspace --all-targets -- -D warnings
