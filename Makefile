# `make` lists the targets. Targets create .venv on first use and update it whenever pyproject.toml changes.
#   make PYTHON=/path/to/python3.12 test     choose the Python (default: the first suitable one on the PATH)
#   make EXTRAS=tpu assistant                choose the hardware: cuda, cuda12, tpu, or none (default: detected)
#   make JOBS=4 test                         run the tests in 4 processes (up to 4 GB each)
#   make LABELS=votes.sqlite assistant       use people's preferences (`make label`), not the simulated annotator's

VENV ?= .venv
PYTHON ?=
EXTRAS ?=
ARGS ?=
JOBS ?= 2
WORKERS = -n $(JOBS) --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.set-up$(addprefix -,$(EXTRAS))
CANDIDATES := python3 python3.12 python3.13 python3.11 python3.14 python
SOURCES := jaxgpt tests docs $(wildcard experiments tpu)
# What `make test-core` runs: the tests that depend on the Python or jax version rather than on our own maths.
CORE := $(foreach name,test_golden test_attention test_sharding test_generate test_step test_ppo test_checkpoints test_saved_model \
          test_plan,$(wildcard tests/$(name).py tests/*/$(name).py))

.DEFAULT_GOAL := help
.PHONY: help assistant taste blind frontier label chat chat-web test test-all coverage breaks soak torture gpu-gate plan-all measure test-core lint set-up clean

help:  ## list the targets
	@echo "usage: make TARGET [ARGS=\"--preset gpu\"]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

assistant: $(STAMP)  ## from raw text to an assistant: run every stage in order (ARGS: its flags)
	@$(PY) -m experiments.assistant $(if $(LABELS),--labels "$(LABELS)") $(ARGS)

taste: $(STAMP)  ## bend a chat model to your own taste, in about 5 minutes (ARGS: its flags, such as --web)
	@$(PY) -m experiments.taste $(ARGS)

blind: $(STAMP)  ## after `assistant`: which do you prefer, before or after PPO? Twelve blind pairs (ARGS: its flags)
	@$(PY) -m experiments.blind $(ARGS)

frontier: $(STAMP)  ## run `assistant`, then plot reward against KL for every method, seed and beta (ARGS: its flags)
	@$(PY) -m experiments.assistant
	@$(PY) -m experiments.studies.frontier $(ARGS)

label: $(STAMP)  ## open a page where people pick the best of several answers (ARGS: its flags)
	@$(PY) -m experiments.label $(ARGS)

chat: $(STAMP)  ## talk to a trained model (ARGS: its flags)
	@$(PY) -m experiments.chat $(ARGS)

chat-web: $(STAMP)  ## open a page where models answer side by side, token by token (ARGS: its flags)
	@$(PY) -m experiments.chat_web $(ARGS)

test: $(STAMP)  ## run the quick tests
	@$(PY) -m pytest $(WORKERS) -m "not slow" $(ARGS)

test-all: $(STAMP)  ## run all tests
	@$(PY) -m pytest $(WORKERS) $(ARGS)

coverage: $(STAMP)  ## line coverage of jaxgpt/ by the quick tests (ARGS="--show-missing")
	@$(PY) -m coverage erase
	@$(PY) -m coverage run -m pytest $(WORKERS) -m "not slow"
	@$(PY) -m coverage combine -q
	@$(PY) -m coverage report $(ARGS)

breaks: $(STAMP)  ## break the library in twelve places and check that a quick test fails each time
	@$(PY) -m tests.breaks $(ARGS)

soak: $(STAMP)  ## kill every stage 20 times and check that the results are bit-identical (about an hour; ARGS: its flags)
	@$(PY) -m tests.slow.soak $(ARGS)

torture: $(STAMP)  ## damage files, places and processes at random: nothing may be falsified (ARGS: its flags)
	@$(PY) -m tests.torture $(ARGS)

gpu-gate: $(STAMP)  ## compile training, PPO and decoding for an H100 and check the programs (no GPU needed; VENV=.venv-gpu EXTRAS=cuda)
	@$(PY) -m pytest -m slow --durations=0 tests/tpu/test_gpu_gate.py $(ARGS)

plan-all: $(STAMP)  ## plan every kind of machine whose compiler is here (VENV=.venv-tpu EXTRAS=tpu, VENV=.venv-gpu EXTRAS=cuda; ARGS: its flags)
	@$(PY) -m tpu.plan_all $(ARGS)

measure: $(STAMP)  ## check and measure this package on the GPU or TPU of this machine, in 8 minutes (ARGS: its flags)
	@$(PY) -m tpu.measure $(ARGS)

test-core: $(STAMP)  ## run the quick tests of the core modules, e.g. for a second Python version
	@$(PY) -m pytest $(WORKERS) -m "not slow" $(CORE) $(ARGS)

lint: $(STAMP)  ## run ruff and mypy
	@$(PY) -m ruff check $(SOURCES)
	@$(PY) -m ruff format --check -q $(SOURCES) || { echo "error: not formatted; run $(PY) -m ruff format $(SOURCES)"; exit 1; }
	@$(PY) -m mypy $(filter-out tests docs,$(SOURCES))

set-up: $(STAMP)  ## only create the virtual environment

clean:  ## remove the virtual environment and caches (runs are kept)
	rm -rf $(VENV) .venv-3.12 .venv-tpu .venv-gpu build dist *.egg-info .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# A candidate must really run (a version manager's shim may exist and fail), be 3.11 or later, and have venv and pip.
$(STAMP): pyproject.toml
	@set -eu; \
	suits() { "$$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	if [ -n "$(PYTHON)" ]; then \
	  suits "$(PYTHON)" || { echo "error: PYTHON=$(PYTHON) does not run, is older than 3.11, or lacks venv"; exit 1; }; \
	  python="$(PYTHON)"; \
	else \
	  python=; for one in $(CANDIDATES); do if suits $$one; then python=$$one; break; fi; done; \
	  [ -n "$$python" ] || { echo "error: found no Python 3.11 or later with venv (on Debian: apt install" \
	    "python3-venv); install one, or name it: make PYTHON=/path/to/python3.12 ..."; exit 1; }; \
	fi; \
	extras="$(EXTRAS)"; hardware=; \
	if [ -z "$$extras" ]; then \
	  if driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) \
	      && [ -n "$$driver" ] && [ "$${driver%%.*}" -gt 0 ] 2>/dev/null; then \
	    if [ "$${driver%%.*}" -ge 580 ]; then extras=cuda; else extras=cuda12; fi; \
	    hardware=" for the NVIDIA GPU (driver $$driver)"; \
	  elif [ -e /dev/accel0 ] || { [ -e /dev/vfio/0 ] && [ -n "$${TPU_ACCELERATOR_TYPE:-$${TPU_NAME:-}}" ]; }; then \
	    extras=tpu; hardware=" for the TPU"; \
	  fi; \
	fi; \
	case "$$extras" in ""|none) extras=all,dev;; *) extras=all,dev,$$extras;; esac; \
	echo "setting up $(VENV)$$hardware with $$("$$python" --version) (about a minute, once)"; \
	$(PY) -c pass 2>/dev/null || "$$python" -m venv --clear $(VENV); \
	$(PY) -m pip install -qq --disable-pip-version-check -e ".[$$extras]" || \
	  { echo "error: the installation failed (see above); 'make set-up' tries again"; exit 1; }; \
	touch $@; \
	echo "ready: $$($(PY) -c 'import jax, flax; print("jax", jax.__version__, "flax", flax.__version__)')"
