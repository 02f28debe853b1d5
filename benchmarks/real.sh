#!/usr/bin/env bash
# The table of README: a real LLM by Hugging Face, llama.cpp, vLLM and CORAL on this machine, same prompts, one run.
#   benchmarks/real.sh OUTPUT MODEL.gguf [DRAFTER] [options of real.py]
# Nothing else may run. It takes half an hour for SmolLM2-135M on two cores, goes on where it was stopped, and makes
# the engines' environments (.venv-llama, .venv-engines: 3 GB) and, once, the model at other precisions (runs/models).
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:?usage: real.sh OUTPUT MODEL.gguf [DRAFTER] [options]} MODEL=${2:?which GGUF file?}
shift 2
DRAFTER=""
if [[ $# -gt 0 && $1 != --* ]]; then
  DRAFTER=$1
  shift
fi
make -s install .venv-llama/installed .venv-engines/installed
exec .venv/bin/python benchmarks/real.py "$OUT" --target "$MODEL" ${DRAFTER:+--drafter "$DRAFTER"} "$@"
