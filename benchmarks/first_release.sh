#!/usr/bin/env bash
# The tables of benchmarks/README.md: greedy with peers, T = 1 with and without coupled drafting, bfloat16.
# Nothing else may run meanwhile. About an hour on four cores.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-runs}
C=".venv/bin/coral bench --deepen 32 --limit 40"
D="--drafter coral=src/coral/embedded/drafter"
$C --dtype float32 --temperature 0 --max-new-tokens 48 --output "$OUT/float32-greedy"
$C $D --dtype float32 --temperature 1 --uncoupled --no-peers --max-new-tokens 32 --output "$OUT/float32-sampled"
$C $D --dtype bfloat16 --temperature 0 --temperature 1 --uncoupled --no-peers --max-new-tokens 10 \
  --output "$OUT/bfloat16"
