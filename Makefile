# Everything a newcomer needs, from a bare Python 3.11:
#   make run [MODEL=path.gguf] [PROMPT="..."]   generate text over two devices, with a report
#   make test | check | bench | docs | pictures | soak | clean

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?=
PROMPT ?=
ARGS   ?=

# Kernels' threads that wait must not take the cores from the other test process, and hundreds of processes of tests must
# not each compile the package again, as they do where the environment forbids Python to keep bytecode.
QUIET_THREADS := NUMBA_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=

.PHONY: run test check bench docs pictures soak clean
.DEFAULT_GOAL := run

$(VENV)/python.stamp:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pyggml needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/run.stamp: pyproject.toml | $(VENV)/python.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/test.stamp: pyproject.toml | $(VENV)/python.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/run.stamp

export MODEL PROMPT
run: $(VENV)/run.stamp
	@$(BIN)/pyggml demo $${MODEL:+--model "$$MODEL"} $${PROMPT:+--prompt "$$PROMPT"} $(ARGS)

# A browser is found, or installed where that is possible; kernels are compiled once, before two processes would both do it.
# With `worksteal` a process has tests in a row: what a file's tests share is made once.
test: $(VENV)/test.stamp
	$(BIN)/python tests/browser/find_browser.py $(ARGS)
	$(QUIET_THREADS) $(BIN)/python -c 'from pyggml.commands._kernels import warm_up; warm_up()'
	$(QUIET_THREADS) PYGGML_CHECK=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=20 -m 'not slow and not gpu' $(ARGS)

check: $(VENV)/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy pyggml
	rm -rf build  # else the wheel keeps modules that are gone
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/wheel .
	cd build/wheel && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache/wheel -p pyggml

bench: $(VENV)/test.stamp
	set -e; for bench in tests/bench/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench; done

soak: $(VENV)/docs.stamp
	$(QUIET_THREADS) PYGGML_CHECK=1 $(BIN)/python -m pytest -m slow --timeout 3600 $(ARGS)

$(VENV)/docs.stamp: pyproject.toml | $(VENV)/python.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,docs]'
	@touch $@ $(VENV)/test.stamp $(VENV)/run.stamp

# The site, build/docs/index.html; warnings are errors, and a browser looks at it. Pages stay as they are.
docs: $(VENV)/docs.stamp
	rm -rf build/docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning -c docs . build/docs
	$(BIN)/python tests/browser/find_browser.py
	SITE=build/docs $(BIN)/python -m pytest -q tests/browser/test_site.py

# Pictures are made by the commands they show; what tutorials print is what they say.
pictures: $(VENV)/test.stamp
	$(BIN)/python tests/browser/find_browser.py
	$(BIN)/python docs/make_pictures.py
	$(BIN)/python docs/make_page_pictures.py
	$(BIN)/python docs/make_pass_picture.py
	$(BIN)/python -m pytest -q tests/test_tutorials.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find pyggml kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
