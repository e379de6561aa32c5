# The two commands of the README, and what developers need. `make help` lists them.

PYTHON ?= python3
VENV   ?= .venv
# Where pip finds PyTorch's CPU build, if the default index has only the CUDA one:
# make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
ARGS   ?=
MODEL  ?=

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
TORCH   := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
LIBRARY := vllm_fibquant/lib/libfibquant_cpu.so
CSRC    := $(shell find csrc -name '*.h' -o -name '*.cpp')

.PHONY: help serve test test-slow lint format bench eval wheel clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

serve: $(LIBRARY)  ## install, build, fetch the demo model, serve on port 8000 (MODEL=, ARGS=)
	$(BIN)/vllm-fibquant serve $(MODEL) $(ARGS)

test: $(VENV)/.dev $(LIBRARY)  ## run the tests (ARGS= goes to pytest)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev $(LIBRARY)  ## run the slow tests as well
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: $(VENV)/.dev  ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

bench: $(VENV)/.dev $(LIBRARY)  ## measure kernels and engine beside vLLM's own attention
	$(BIN)/python -m benchmarks $(ARGS)

eval: $(VENV)/.dev $(LIBRARY)  ## quality of every format, ours and others: an hour (ARGS=--quick: minutes)
	$(BIN)/vllm-fibquant eval $(MODEL) --out docs/results --images docs/images $(ARGS)

wheel: $(VENV)/.deps  ## build a wheel into dist/
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## remove everything built here, the environment and the demo model
	rm -rf $(VENV) .models build dist $(LIBRARY) *.egg-info
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

$(LIBRARY): $(CSRC) setup.py | $(VENV)/.deps
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
