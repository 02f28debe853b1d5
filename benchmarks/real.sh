#!/usr/bin/env bash
# The table of README: a real LLM by Hugging Face, llama.cpp, vLLM and CORAL on this machine, same prompts, one run.
#   benchmarks/real.sh OUTPUT [--target MODEL.gguf --drafter DIRECTORY] [options of real.py]
# Nothing else may run. It goes on where it was stopped, and makes the engines' environments (.venv-llama, and
# .venv-engines: 3 GB) and, once, the model at other precisions (runs/models). vLLM compiles for a minute or two each time.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${1:?usage: real.sh OUTPUT [--target MODEL.gguf --drafter DIRECTORY] [options]}"
make -s install .venv-llama/installed .venv-engines/installed
exec .venv/bin/python benchmarks/real.py "$@"
