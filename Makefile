# `make` alone prints the targets. Everything is installed into .venv, once.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install run clean lint test test-slow test-faults test-shuffled test-gpu test-browser test-harness test-distributed-build bench gpu bench-all

help: ## show this list
	@awk -F ':.*## ' '/^##@ /{printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## /{printf "  make %-23s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python must be 3.11 or later, but is $$($(PYTHON) --version 2>&1); name another with make PYTHON=python3.11" >&2; exit 1; }
	rm -rf .venv
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: requirements.txt | .venv/.created
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.installed-dev: requirements-dev.txt requirements.txt | .venv/.created
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@ .venv/.installed

##@ Use

install: .venv/.installed ## set up .venv with the pinned requirements

run: .venv/.installed ## train the demo model on this machine's Python source (3 to 11 minutes)
	@$(BIN)/python main.py

clean: ## remove .venv and caches; runs/ and data/ stay
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis

##@ Check

test: .venv/.installed-dev ## check the style, then run the test suite (3 to 10 minutes, offline)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/python -m pytest

test-slow: .venv/.installed-dev ## run the tests that take minutes: all of MBPP, mutants, more runs and signals
	@$(BIN)/python -m pytest -m slow

test-faults: .venv/.installed-dev ## kill, damage and starve runs by the hundred; writes a table (15 minutes)
	@$(BIN)/python -m pytest -n 0 -m faults tests/faults

# SEED=7 repeats an order; without it the order is new
test-shuffled: .venv/.installed-dev ## run the test suite in a random order with every core kept busy (twice as long)
	@loops=; for core in $$(seq $$(getconf _NPROCESSORS_ONLN)); do (while :; do :; done) & loops="$$loops $$!"; done; \
	trap "kill $$loops" EXIT; trap 'exit 130' INT TERM; \
	$(BIN)/python -m pytest --shuffle $${SEED:-$$(date +%s)}

test-gpu: .venv/.installed-dev ## run the tests that need a CUDA GPU (a minute or two; skipped where there is none)
	@$(BIN)/python -m pytest -m gpu tests/gpu

test-browser: .venv/.installed-dev ## try the page in Chromium and the server in Neovim (a minute; skipped without them)
	@$(BIN)/python -m pytest -n 0 -rs -m browser tests/serving

test-harness: .venv/.installed-dev ## install lm-eval, and run the tests that need it
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-harness.txt accelerate==1.15.0
	@$(BIN)/python -m pytest tests/evaluation/test_harness_data.py tests/evaluation/test_harness_model.py tests/evaluation/test_harness.py

test-distributed-build: .venv/.installed-dev ## install datatrove, and run the tests of distributed data builds
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-distributed-build.txt
	@$(BIN)/python -m pytest tests/data/test_distributed_build.py

lint: .venv/.installed-dev ## check style and types (half a minute at first, then seconds)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

##@ Measure

bench: .venv/.installed-dev ## compare speed with other implementations on this machine (under 30 minutes)
	@$(BIN)/python benchmarks/train_throughput.py
	@$(BIN)/python benchmarks/time_to_loss.py --minutes 1
	@$(BIN)/python benchmarks/data.py --repeats 1
	@$(BIN)/python benchmarks/generation.py
	@$(BIN)/python benchmarks/summary.py

gpu: .venv/.installed-dev ## check and measure everything on a CUDA GPU (9 minutes on a fast one)
	@$(BIN)/python benchmarks/gpu.py

bench-all: bench ## measure all other figures too (over an hour more)
	@$(BIN)/python benchmarks/time_to_loss.py
	@$(BIN)/python benchmarks/ablation.py
	@$(BIN)/python benchmarks/portability.py
	@$(BIN)/python benchmarks/data.py
	@$(BIN)/python benchmarks/pipeline.py
	@$(BIN)/python benchmarks/start.py
	@$(BIN)/python benchmarks/shared_machine.py
	@$(BIN)/python benchmarks/ranks.py
	@$(BIN)/python benchmarks/fsdp_smallcoder.py
	@$(BIN)/python benchmarks/sft.py
	@$(BIN)/python benchmarks/evaluation.py
	@$(BIN)/python benchmarks/serving.py
	@$(BIN)/python benchmarks/summary.py
