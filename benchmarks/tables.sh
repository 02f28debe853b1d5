#!/usr/bin/env bash
# The tables of benchmarks/README.md. DATA is what `coral data prepare` wrote, STAGE1 an EAGLE drafter trained on it
# (benchmarks/README.md says how). Training takes two hours on four cores and may run beside other work; for the
# benches at the end nothing else may run. `FULL=1` takes the whole suites and 128 tokens a turn: a day on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${1:?usage: tables.sh DATA STAGE1 OUTPUT} STAGE1=${2:?} OUT=${3:?}
mkdir -p "$OUT"
DATA=$(realpath "$DATA") STAGE1=$(realpath "$STAGE1") OUT=$(realpath "$OUT")
SPEC_BENCH=${SPEC_BENCH:+$(realpath "$SPEC_BENCH")}
BIN=$PWD/.venv/bin HERE=$PWD/benchmarks
OWN=$PWD/tests/toy/drafter
cd "$OUT" && { [ -e stage1 ] || ln -s "$STAGE1" stage1; }

# Recipes on equal data, and the options of the alignment.
"$BIN/python" "$HERE/train_all.py" "$HERE/recipes.yaml" "$DATA" recipes
"$BIN/python" "$HERE/train_all.py" "$HERE/sweep.yaml" "$DATA" sweep
HELD="--max-new-tokens 32 --tree 4,4,15"
"$BIN/python" "$HERE/held_out.py" "$HERE/recipes.yaml" "$DATA" recipes coral $HELD | tee recipes.md
"$BIN/python" "$HERE/held_out.py" "$HERE/sweep.yaml" "$DATA" sweep csra $HELD | tee sweep.md

# The table: three recipes with the full head, CORAL with its router, and the shipped pair.
if [ ! -e coral-routed ]; then
  cp -r recipes/coral-0 coral-routed
  "$BIN/coral" train-head coral-routed --data "$DATA" --groups 32 --active 8 --updates 150 --dtype float32
fi
# The draft model of Hugging Face's assisted generation.
[ -e assistant ] || OMP_NUM_THREADS=1 "$BIN/python" "$HERE/draft_model.py" "$DATA" assistant
# The six suites of Spec-Bench, whose licences forbid shipping it: SPEC_BENCH is the path of its questions.
SUITES=${SPEC_BENCH:+"--suite humaneval,gsm8k,$SPEC_BENCH"}
FIRST="--limit 4" FIRST_40="--limit 40" TOKENS=64 FEW=12
[ -z "${FULL:-}" ] || { FIRST="" FIRST_40="" TOKENS=128 FEW=128; }
RECIPES="--drafter eagle2=recipes/eagle2-0+full --drafter hass=recipes/hass-0+full --drafter coral=recipes/coral-0+full"
BENCH="$BIN/coral bench --deepen 32 --dtype float32"
# The table: all drafters draft the tree that is tuned for the shipped one on this machine.
[ -e tuned ] || cp -r "$OWN" tuned
"$BIN/coral" tune tuned --deepen 32 --dtype float32
TREE="--tree ${TREE:-2,6,7,0.1}" # what it found here; TREE=... for what it finds elsewhere
SHIPPED="--drafter shipped+full=tuned+full --drafter shipped=tuned+static --drafter shipped+in_context=tuned+in_context"
SHIPPED="$SHIPPED --drafter shipped+lookup=tuned+static+ngram --assistant assistant"
$BENCH $SUITES $FIRST $RECIPES $SHIPPED --temperature 0 --temperature 1 --max-new-tokens $TOKENS $TREE --output table
# Coupled and uncoupled drafting, and the paper's router, on more prompts.
ROUTED="--drafter coral+router=coral-routed --drafter shipped=$OWN+static"
MORE="--drafter shipped+router=$OWN+routed --drafter shipped+lookup=$OWN+static+ngram"
$BENCH $FIRST_40 $RECIPES $ROUTED $MORE --max-new-tokens 16 --ignore-eos --output float32-greedy
$BENCH $FIRST_40 $RECIPES $ROUTED --temperature 1 --uncoupled --no-peers --max-new-tokens $FEW --ignore-eos --output float32-sampled

# What the parts cost, and where a cycle's time goes.
"$BIN/python" "$HERE/heads.py" heads
"$BIN/python" "$HERE/prompts.py" prompts
OMP_NUM_THREADS=1 "$BIN/python" "$HERE/families.py"
"$BIN/python" "$HERE/dense.py" --output memory
CYCLE="--dtype bfloat16 --suites humaneval,gsm8k,mt_bench --limit 6 --rounds 1"
OWN="$HERE/../tests/toy/drafter+static"
"$BIN/python" "$HERE/cycle.py" cycle-chain-lookup $CYCLE --drafter "$OWN+ngram" --tree 1,6,7,0.15
"$BIN/python" "$HERE/cycle.py" cycle-tree-lookup $CYCLE --drafter "$OWN+ngram" --tree 2,6,10,0.1
"$BIN/python" "$HERE/cycle.py" cycle-tree $CYCLE --drafter "$OWN" --tree 2,6,7,0.1
"$BIN/python" "$HERE/cycle.py" cycle-sampled $CYCLE --drafter "$OWN" --tree 2,6,7,0.1 --temperature 1
"$BIN/python" "$HERE/hostile.py" hostile
