#!/usr/bin/env bash
# Train the drafter that the package ships for SmolLM2-135M-Instruct. Every step goes on where it was stopped.
#
#   benchmarks/shipped.sh [WORK]        a directory for data and runs; default: ~/.cache/coral/shipped
#   MINUTES=240 benchmarks/shipped.sh   longer training, in a WORK of its own
#
# What it took is in benchmarks/README.md, tau over its minutes in benchmarks/2026-11-30-curve.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-$HOME/.cache/coral/shipped}
target=$(.venv/bin/python -c 'from coral.target.default import fetch; print(fetch())')
mkdir -p "$work"

# The target's own answers to prompts of eleven public sets (shipped/LICENSES.md), half greedy, half at temperature
# 0.8, until 1.5 million tokens of them were there:
#   coral data regenerate FILES --output answers.jsonl --limit 24000 --max-turns 2 --max-new-tokens 256
[ -d "$work/data" ] ||
  .venv/bin/coral data prepare benchmarks/shipped/answers.jsonl.gz --tokenizer "$target" --output "$work/data" --held-out 64

# The target reads the data once; two processes of one thread each are faster than one of two.
for part in 1/2 2/2; do
  OMP_NUM_THREADS=1 .venv/bin/coral data features "$work/data" --output "$work/features" --batch-size 16 --shard $part &
done
wait

OMP_NUM_THREADS=1 .venv/bin/coral train --data "$work/features" --output "$work/drafter" --recipe coral \
  --minutes "${MINUTES:-94}" --set one_step=0.5 --set batch_size=8 --set reports.acceptance_every=0
for kind in routed static; do  # the last one is its own
  .venv/bin/coral train-head "$work/drafter" --data "$work/features" --kind $kind
done
.venv/bin/coral tune "$work/drafter"
.venv/bin/coral tune "$work/drafter" --dtype bfloat16
.venv/bin/python benchmarks/ship.py "$work/drafter"
