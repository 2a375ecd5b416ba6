#!/usr/bin/env bash
# The paper in miniature: trains and analyses everything that docs/paper.md shows, on generated pictures.
# Finished runs are kept, stopped analyses go on: run it again after an interruption.
set -euo pipefail

runs=runs/miniature
out=${OUT:-$runs/paper}
kinds="fc conv double-fc double-conv double-head-reverse double-head double-head-ext"
seeds=${SEEDS:-0 1 2}  # docs/paper.md: 0 1

train() { # folder, recipe, options
  local folder=$1
  shift
  if [ ! -f "$folder/metrics.json" ]; then
    if [ -d "$folder" ]; then python -m doublehead train --resume "$folder"; else
      python -m doublehead train "$@" --out "$folder"
    fi
  fi
}

train $runs/start shapes-ext
for seed in $seeds; do
  for kind in $kinds; do train "$runs/$kind-seed$seed" "miniature-$kind" --train.seed "$seed"; done
  for fusion in none max average; do
    metrics=$runs/double-head-ext-seed$seed/metrics-$fusion.json
    [ -f "$metrics" ] || python -m doublehead evaluate "$runs/double-head-ext-seed$seed" --fusion $fusion --metrics "$metrics"
  done
done
for kind in fc double-head double-head-ext; do # three times as long
  train "runs/miniature-long/$kind" "miniature-$kind" --train.steps 1440 --train.milestones 1050 1320
done
for number in 1 3 4; do
  python -m doublehead tables $number --miniature --runs $runs --format markdown --overwrite --out "$runs/table-$number.md"
done

fc=$runs/fc-seed0 conv=$runs/conv-seed0 ext=$runs/double-head-ext-seed0
analyze() { python -m doublehead analyze "$@"; }
analyze sliding-windows "fc alone=$fc" "conv alone=$conv" "Ext, fc=$ext:fc" "Ext, conv=$ext:conv" \
  --difficulty $fc --data.val-images 8 --out "$out/sliding-windows"
analyze pearson "fc alone=$fc" "conv alone=$conv" "Ext, fc=$ext:fc" "Ext, conv=$ext:conv" \
  --difficulty $fc --data.val-images 8 --out "$out/pearson"
analyze fc-weights "fc alone=$fc" "Ext=$ext" --overwrite --out "$out/fc-weights"
analyze feature-correlation "Ext=$ext" --data.val-images 60 --out "$out/feature-correlation"
analyze balance-weights --l-fc 0.4 0.7 1.0 --l-conv 0.4 0.8 1.0 --runs $runs --out "$out/balance-weights"
analyze qualitative $ext --data.val-images 150 --out "$out/qualitative"
