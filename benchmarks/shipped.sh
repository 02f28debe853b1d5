#!/usr/bin/env bash
# Train the drafter that the package ships for SmolLM2-135M-Instruct. Every step goes on where it was stopped.
#
#   benchmarks/shipped.sh [WORK]        a directory for data and runs; default: ~/.cache/coral/shipped
#   MINUTES=240 benchmarks/shipped.sh   longer training, in a WORK of its own
#
# Then copy WORK/drafter to src/coral/embedded/drafter, without coral/training. What it took is in benchmarks/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-$HOME/.cache/coral/shipped}
target=$(.venv/bin/python -c 'from coral import models; print(models.fetch())')
mkdir -p "$work"

# The target's own answers to prompts of eleven public sets (shipped/LICENSES.md), half greedy, half at temperature
# 0.8, until 1.5 million tokens of them were there:
#   coral data regenerate FILES --output answers.jsonl --limit 24000 --max-turns 2 --max-new-tokens 256
[ -d "$work/data" ] ||
  .venv/bin/coral data prepare benchmarks/shipped/answers.jsonl.gz --tokenizer "$target" --output "$work/data" --held-out 64

.venv/bin/coral train --data "$work/data" --output "$work/drafter" --recipe coral --minutes "${MINUTES:-50}" \
  --set one_step=0.5 --set batch_size=8 --set reports.acceptance_every=0
for kind in static routed; do
  .venv/bin/coral train-head "$work/drafter" --data "$work/data" --kind $kind
done
.venv/bin/coral tune "$work/drafter"
