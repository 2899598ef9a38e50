.DEFAULT_GOAL := help
PY := .venv/bin/python

.PHONY: help setup run test all-tests test-fast lint demo starter parity bench-alignment bench-serving lock clean

help:  ## print what can be done
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup:  ## install everything needed to run (done by the others too)
	@bash .ci/setup

run: setup  ## start Kotae and print its address (options: make run ARGS="--port 8000 --model /path")
	@$(PY) app.py serve $(ARGS)

demo: setup  ## start Kotae, let simulated staff use it, and run one alignment
	@$(PY) app.py demo $(ARGS)

test:  ## lint, types and every test, with real vLLM, SQLite and Chromium
	@bash .ci/setup --dev
	@$(MAKE) --no-print-directory -j 2 -k lint all-tests

all-tests:  # beside lint: while tests wait for servers to boot there is a processor for it
	@$(PY) -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

test-fast:  ## the tests that need neither vLLM nor a browser
	@bash .ci/setup --dev
	@$(PY) -m pytest -m "not vllm and not browser and not slow" $(ARGS)

lint:  ## ruff and mypy --strict
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

starter: setup  ## train the starter model again (resumable)
	@$(PY) -m alignment.starter train --resume

parity:  ## compare the training with TRL's, step by step (makes .venv-peers; not part of test)
	@bash .ci/setup --dev
	@bash .ci/peers
	@KOTAE_PARITY=1 $(PY) -m pytest tests/parity $(ARGS)

bench-alignment:  ## measure training cost beside TRL's (make bench-alignment ARGS="--method dpo --rounds 5")
	@bash .ci/setup --dev
	@bash .ci/peers
	@$(PY) tests/benchmarks/against_trl.py $(ARGS)

bench-serving: setup  ## measure what Kotae adds to vLLM (make bench-serving ARGS="--soak-min 30")
	@$(PY) tests/benchmarks/serving.py $(ARGS)

lock:  ## write requirements*.lock from what is installed in .venv
	@$(PY) .ci/lock.py

clean:  ## remove the virtual environment and caches, never data/
	rm -rf .venv .venv-peers build *.egg-info .pytest_cache .mypy_cache .ruff_cache
