# Everything a user or developer runs. `make help` lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  ?= models/SmolLM2-135M-Instruct
RESULTS ?= benchmarks/results
# Most of a test's time is one process starting, so two run at a time; two torch threads each
# would collapse on two cores.
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
JOBS   ?= 2
# The repository root must not be on the import path of a server: it holds folders
# (kernels/, demo/) that would shadow packages SGLang imports.
export PYTHONSAFEPATH := 1
export HF_HUB_OFFLINE := 1
# Where it is set, each of a server's processes would compile all of SGLang again: 26 s of imports
# instead of 15.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup model profile demo demo-terminal bench serve doctor test test-unit test-long test-gpu lint format docs clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: ## create .venv and install everything (chooses CPU or GPU by itself)
	@$(PYTHON) .ci/environment.py

model: setup ## convert the chat model SmolLM2-135M-Instruct into models/
	@$(BIN)/python demo/prepare_model.py --out $(MODEL)

# Before the tests and with all cores: two of them at a time would wait for it.
profile: model
	@test -s $(MODEL).krul.safetensors || $(BIN)/krul calibrate --model $(MODEL) --out $(MODEL).krul.safetensors

demo: profile ## chat in the browser, evict a conversation, see it come back
	@GRADIO_ANALYTICS_ENABLED=False $(BIN)/python demo/app.py --model $(MODEL) $(ARGS)

demo-terminal: model ## the same in a terminal: conversations that evict each other, turn by turn
	@$(BIN)/python demo/terminal.py --model $(MODEL) $(ARGS)

bench: profile ## time to first token of returning conversations, with plots (hours; docs/restore.md)
	@$(BIN)/python benchmarks/restore.py --model $(MODEL) --profile $(MODEL).krul.safetensors \
		--json $(RESULTS)/restore.json $(ARGS)
	@$(BIN)/python benchmarks/restore_report.py $(RESULTS)/restore.json $(RESULTS)

serve: profile ## serve the chat model with Krul (ARGS="--krul-policy lossless")
	@$(BIN)/krul serve --model-path $(MODEL) --krul-profile $(MODEL).krul.safetensors $(ARGS)

doctor: setup ## check this installation
	@$(BIN)/krul doctor

test: profile ## all tests that fit in minutes
	@$(PYTEST) -m "not long and not gpu" $(ARGS)

test-unit: setup ## tests without a server, under a minute
	@$(PYTEST) -m "not long and not gpu and not server and not process" $(ARGS)

test-long: profile ## every test
	@$(PYTEST) -m "not gpu" $(ARGS)

# Needs torch, triton, numpy and pytest, nothing else: any machine with a GPU will do.
test-gpu: ## the kernels' tests, on the GPU where there is one (PYTHON=... chooses the interpreter)
	@PYTHONPATH=kernels $(PYTHON) -m pytest --confcutdir=tests/kernels tests/kernels $(ARGS)

lint: setup ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup ## format and fix
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

docs: setup ## regenerate the generated parts of README.md and docs/
	@$(BIN)/krul docs
	@$(BIN)/python benchmarks/headline.py --png docs/headline.png

clean: ## remove build products (keeps .venv and models)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
