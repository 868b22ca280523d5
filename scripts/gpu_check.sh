#!/usr/bin/env bash
# Measures a learner on the GPU of this machine, under ten minutes: gpu_check.sh [FOLDER]. Without a GPU, and with
# QUICK=1, it runs the same commands small. One JSON file a measurement, and table.txt, in FOLDER.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_check}
rollstream=${ROLLSTREAM:-.venv/bin/rollstream}
quick=${QUICK:+--quick}
mkdir -p "$out"
status=0

measure() { # measure NAME COMMAND...
  local name=$1 started=$SECONDS
  shift
  if timeout 240 "$@" >"$out/$name.json" 2>"$out/$name.log"; then
    echo "$name: $((SECONDS - started)) s" | tee -a "$out/table.txt"
  else
    echo "$name: failed with status $?, see $out/$name.log" | tee -a "$out/table.txt"
    status=1
  fi
}

: >"$out/table.txt"
{ nvidia-smi --query-gpu=name,memory.total --format=csv,noheader || echo "no GPU"; } >>"$out/table.txt" 2>/dev/null
sizes=${SIZES:-tiny 2B 4B}
for size in $sizes; do
  measure "lora-$size" "$rollstream" bench learner --size "$size" --lora 16 --checkpointing $quick --json
  measure "memory-$size" "$rollstream" doctor configs/recipes/qwen3_vl_2b_1gpu_full.yaml --memory --size "$size" --json
done
for size in ${FULL_SIZES:-tiny 2B}; do
  measure "full-$size" "$rollstream" bench learner --size "$size" $quick --json
  measure "full-$size-checkpointing" "$rollstream" bench learner --size "$size" --checkpointing $quick --json
  measure "full-$size-segments" "$rollstream" bench learner --size "$size" --attention segments $quick --json
done
exit $status
