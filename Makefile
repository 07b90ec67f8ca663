# make demo          plain generate and the bundled draft side by side, from nothing
# make test          the test suite, from nothing (about ten minutes on two cores)
# make test-all      with the slow tests
# make test-oldest   the suite with the oldest supported transformers
# make lint          ruff and mypy
# make bench         the bundled pair and the inflated pair, into benchmarks/results/

PYTHON ?= python3
PAIR = examples/tiny_pair
TARGET = $(PAIR)/dovetail-tiny-target
DRAFT = $(PAIR)/dovetail-tiny-draft

.PHONY: setup demo test test-all test-oldest lint bench clean

setup: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e ".[test]"
	touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q -c constraints-oldest.txt -e ".[test]"
	touch $@

demo: setup
	.venv/bin/dovetail generate --target $(TARGET) --draft $(DRAFT) --dtype float32 --compare \
	  --max-new-tokens 200 \
	  --prompt "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her friends every day with four. She sells the remainder at the farmers' market daily for 2 dollars per fresh duck egg. How much in dollars does she make every day at the farmers' market?"

test: setup
	.venv/bin/python -m pytest -m "not slow"

test-all: setup
	.venv/bin/python -m pytest

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -m "not slow"

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

bench: setup
	.venv/bin/python benchmarks/run.py

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info
