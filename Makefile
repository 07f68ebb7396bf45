# `make` alone prints the targets. Everything is installed into .venv, once.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install run test test-slow test-faults test-harness test-scatter lint bench bench-all clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | while IFS='|' read -r name text; do printf '  make %-13s %s\n' "$$name" "$$text"; done

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

install: .venv/.installed ## set up .venv with the pinned requirements

run: .venv/.installed ## train the demo model on this machine's Python source (3 to 10 minutes)
	@$(BIN)/python main.py

test: .venv/.installed-dev ## lint, then run the test suite (3 to 10 minutes, offline)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/python -m pytest

test-slow: .venv/.installed-dev ## run the tests that take minutes: all of MBPP, mutants, hostile programs again
	@$(BIN)/python -m pytest -m slow

test-faults: .venv/.installed-dev ## kill, damage and starve runs by the hundred, and put what became of them in a table (15 minutes)
	@$(BIN)/python -m pytest -n 0 -m faults tests/faults

test-harness: .venv/.installed-dev ## run the tests of lm-eval's tasks, which installs lm-eval
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-harness.txt accelerate==1.15.0
	@$(BIN)/python -m pytest tests/test_harness_data.py tests/test_harness_model.py tests/test_harness.py

test-scatter: .venv/.installed-dev ## run the tests of the data build's executors, which installs datatrove
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-scatter.txt
	@$(BIN)/python -m pytest tests/test_scatter.py

lint: .venv/.installed-dev ## check style and types (half a minute at first, then seconds)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: .venv/.installed-dev ## measure speed beside other ways on this machine, side by side (under 30 minutes)
	@$(BIN)/python benchmarks/train_throughput.py
	@$(BIN)/python benchmarks/time_to_loss.py --minutes 1
	@$(BIN)/python benchmarks/data.py --repeats 1
	@$(BIN)/python benchmarks/generation.py
	@$(BIN)/python benchmarks/summary.py

bench-all: bench ## measure the other figures of the README too, and the five minutes in full (over an hour more)
	@$(BIN)/python benchmarks/time_to_loss.py
	@$(BIN)/python benchmarks/ablation.py
	@$(BIN)/python benchmarks/data.py
	@$(BIN)/python benchmarks/pipeline.py
	@$(BIN)/python benchmarks/start.py
	@$(BIN)/python benchmarks/ranks.py
	@$(BIN)/python benchmarks/fsdp_smallcoder.py
	@$(BIN)/python benchmarks/sft.py
	@$(BIN)/python benchmarks/evaluation.py
	@$(BIN)/python benchmarks/summary.py

clean: ## remove .venv and caches; runs/ and data/ stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
