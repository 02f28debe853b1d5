#!/usr/bin/env bash
# The tables of benchmarks/README.md: float32 greedy with peers, float32 at T = 1 with and without coupling, bfloat16.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-runs}
C=".venv/bin/coral bench --deepen 32"
$C --limit 40 --dtype float32 --temperature 0 --max-new-tokens 32 --output "$OUT/float32-greedy"
$C --limit 40 --dtype float32 --temperature 1 --uncoupled --no-peers --max-new-tokens 12 --output "$OUT/float32-sampled"
$C --limit 2 --dtype bfloat16 --temperature 0 --temperature 1 --uncoupled --no-peers --max-new-tokens 8 \
  --output "$OUT/bfloat16"
