# Every target works from a fresh clone: it makes .venv and installs what it needs first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SETUP  := pyproject.toml setup.py constraints.txt
OUT    ?= out/demo
ARGS   ?=

.PHONY: help train test test-gpu soak lint types bench bench-compare clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

train: $(VENV)/.installed  ## train a small GPT on the default corpus, then sample from it (ARGS=... are passed on)
	$(BIN)/fastchargpt train --out-dir $(OUT) --overwrite $(ARGS)
	$(BIN)/fastchargpt sample $(OUT) --max-new-tokens 500

test: $(VENV)/.installed-dev  ## the whole test suite
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-gpu: $(VENV)/.installed-dev  ## the tests that need a GPU; most of their time is compiling, so several run at once
	$(BIN)/python -m pytest -m gpu -n auto --maxprocesses 8 --dist worksteal $(ARGS)

KILLS  ?= 50
INPUTS ?= 100000
TEXT   ?= 1000
soak: $(VENV)/.installed-dev  ## the long reliability tests: KILLS kills of each of eight runs, INPUTS hostile files, TEXT MB
	FASTCHARGPT_SOAK_KILLS=$(KILLS) FASTCHARGPT_FUZZ=$(INPUTS) FASTCHARGPT_SOAK_TEXT_MB=$(TEXT) \
		$(BIN)/python -m pytest -s -q tests/test_kills.py tests/test_fuzz.py tests/test_large_text.py $(ARGS)

lint: $(VENV)/.installed-dev types  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the editable finder, so it gets a tree in which src/fastchargpt, kernels/ and bench/ lie together.
types: $(VENV)/.installed-dev  ## mypy --strict
	@rm -rf build/types && mkdir -p build/types/fastchargpt
	@ln -s $(CURDIR)/src/fastchargpt/* $(CURDIR)/kernels $(CURDIR)/bench build/types/fastchargpt/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p fastchargpt --exclude /bench/static/

bench: $(VENV)/.installed-dev  ## the benchmark suite, and its report (ARGS=--quick for 3 minutes; see bench/README.md)
	$(BIN)/fastchargpt bench --out bench.json $(ARGS)
	$(BIN)/fastchargpt bench report bench.json --out bench.html

bench-compare: $(VENV)/.installed-dev  ## measure again and compare with BASE=earlier.json of the same machine
	@test -n "$(BASE)" || { echo "make bench-compare needs BASE=earlier.json" >&2; exit 2; }
	$(BIN)/fastchargpt bench --out bench.json $(ARGS)
	$(BIN)/fastchargpt bench compare $(BASE) bench.json

clean:  ## remove everything that make made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks bench.json bench.html bench.md src/*.egg-info kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SETUP) | $(VENV)/bin/python
	$(PIP) -e '.[plot]'
	@touch $@

$(VENV)/.installed-dev: $(SETUP) | $(VENV)/bin/python
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed
