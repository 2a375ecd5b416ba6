#!/usr/bin/env bash
# All trainings and measurements behind docs/evidence.md:  DATA=path/to/BCCD evidence/run.sh [PART...]
# Parts that have ended are kept and stopped ones go on: run it again after an interruption.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-runs/evidence}   # wall time of each part: $out/seconds.tsv
seeds=${SEEDS:-0 1 2}
parts=${*:-start own-data bccd longer heads heads-longer heads-narrow heads-bccd factors balance figures precision checks records}
export OMP_NUM_THREADS=1    # two processes of one thread each are faster than one of two
mkdir -p "$out"
lanes=${LANES:-2}
dh() { python -m doublehead "$@"; }
shared() { torchrun --nproc-per-node "$lanes" -m doublehead "$@"; } # seeds or pictures are divided

train() { # folder, options
  local folder=$1
  shift
  [ -f "$folder/metrics.json" ] && return
  if [ -f "$folder/state.pt" ]; then dh train --resume "$folder"; else
    rm -rf "$folder"
    dh train "$@" --out "$folder"
  fi
}

side-by-side() { # commands on standard input, one a line
  xargs -P "$lanes" -d '\n' -I {} bash -c 'set -euo pipefail; {}'
}
export -f train dh
export out

start() { # what all else starts from: a demonstration, and longer on that
  train "$out/demo" shapes-ext
  train "$out/start" miniature-double-head-ext --model.backbone.weights "$out/demo/model.safetensors" \
    --train.steps 1440 --train.milestones 1050 1320 --train.warmup-steps 25 --data.workers 1
}

own-data() {
  for seed in $seeds; do
    local options="--data.root '$DATA' --train.seed $seed --data.workers 1"
    echo "train $out/own-data/own-$seed $options"
    echo "train $out/own-data/from-$seed --from $out/demo $options"
  done | side-by-side
}

bccd-run() { # kind, seed, steps, milestones, part
  echo "train $out/$6/$1-$2 bccd-small --data.root '$DATA' --data.on-bad-record skip --data.workers 1" \
    "--model.backbone.weights $out/demo/model.safetensors --model.backbone.norm frozen_batch_norm" \
    "--model.backbone.frozen-stages 2 --model.head.kind $1 --train.steps $3 --train.milestones $4 $5" \
    "--train.warmup-steps 50 --train.eval-every 240 --train.checkpoint-every 120 --train.seed $2"
}

bccd() {
  for seed in $seeds; do for kind in fc double_head double_fc double_head_ext; do
    bccd-run "$kind" "$seed" 720 540 660 bccd
  done; done | side-by-side
}

longer() { # one seed of two kinds, three times as long
  for kind in fc double_head; do bccd-run "$kind" 0 2160 1620 1980 bccd-longer; done | side-by-side
}

kinds="fc conv double_fc double_conv double_head_reverse double_head double_head_ext"
heads() { shared analyze heads "$out/start" --data.workers 0 --set train.ema_decay=0.99 --save-models $kinds --out "$out/heads"; }

heads-longer() { # twice as long; one conv-head
  shared analyze heads "$out/start" --data.workers 0 --steps 2880 --set train.ema_decay=0.99 --kinds fc double_fc double_head \
    --out "$out/heads-longer"
}

heads-narrow() { # an fc-head with twice the conv-head's weights, as in the paper
  shared analyze heads "$out/start" --data.workers 0 --steps 720 --evaluate-at 180 360 720 --set train.ema_decay=0.99 \
    model.head.fc_dim=64 --kinds fc conv double_fc double_head double_head_ext --out "$out/heads-narrow"
}

heads-bccd() {
  shared analyze heads "$out/bccd/double_head_ext-0" --data.workers 0 --set train.ema_decay=0.99 --out "$out/heads-bccd"
}

factors() { # one at a time; steps of 512 RoIs
  local sgd=train.optimizer=sgd,train.lr=0.02,train.weight_decay=1e-4,train.bias_lr_factor=2.0
  local even=model.loss.w_fc=1.0,model.loss.w_conv=1.0
  shared analyze heads "$out/start" --data.workers 0 --steps 240 --evaluate-at 120 240 --set model.roi.samples=64 \
    train.ema_decay=0.98 --out "$out/factors" --vary model.roi.conv_box_scale=1.0 $even $sgd $sgd,$even model.head.conv_blocks=1 \
    model.head.conv_blocks=5 model.head.non_local.enabled=false model.head.conv_dim=256 model.head.fc_dim=64 \
    train.accumulate=8 model.roi.samples=16 model.roi.samples=128 model.roi.positive_fraction=0.25
}

balance() {
  local pairs=() l_fc l_conv
  for l_fc in 0.4 0.7 1.0; do for l_conv in 0.4 0.8 1.0; do
    pairs+=("model.loss.l_fc=$l_fc,model.loss.l_conv=$l_conv")
  done; done
  shared analyze heads "$out/start" --data.workers 0 --steps 480 --set train.ema_decay=0.99 --kinds double_head_ext \
    --varied-kinds double_head_ext --vary "${pairs[@]}" --out "$out/balance"
  dh analyze balance-weights --heads "$out/balance/heads.json" --out "$out/figures"
}

precision() { # what int8 and a gate cost: the demonstration, the first trial of own-data, and wide heads
  mkdir -p "$out/precision"
  train "$out/large" shapes-ext --model.backbone.weights "$out/demo/model.safetensors" --model.head.fc-dim 1024 \
    --model.head.conv-dim 1024 --model.head.conv-blocks 3 --train.steps 320
  local model
  for model in demo own-data/own-0 large; do
    local copy=$out/precision/$(basename "${model/own-data\/own-0/bccd}")
    [ -f "$copy/gate.json" ] && continue
    rm -rf "$copy"
    mkdir "$copy"
    cp "$out/$model"/{model.safetensors,recipe.json} "$copy"
    dh quantize "$copy" --images 64
    dh calibrate "$copy"
  done
}

figures() { # of one seed; 500 objects, 14,161 windows each
  local models=$out/heads/models readers
  readers=("fc alone=$models/fc-seed0" "conv alone=$models/conv-seed0")
  readers+=("Ext, fc=$models/double_head_ext-seed0:fc" "Ext, conv=$models/double_head_ext-seed0:conv")
  for figure in sliding-windows pearson; do
    shared analyze $figure "${readers[@]}" --difficulty "$models/fc-seed0" --objects 500 --out "$out/figures"
  done
}

checks() {
  python evidence/implementation.py
  python evidence/conv_norms.py "$out/start/model.safetensors" --out "$out/conv_norms.json"
}

records() {
  record() { # part of this script, arguments
    local part=$1
    shift
    python evidence/record.py "$@" --seconds "$out/seconds.tsv" --part "$part"
  }
  mkdir -p docs/evidence
  record own-data own-data "$out/own-data" --start "$out/demo"
  record bccd bccd "$out/bccd" --start "$out/demo"
  record longer bccd bccd-longer "$out/bccd-longer" --start "$out/demo"
  record precision precision "$out/precision"
  record heads heads shapes "$out/heads/heads.json"
  record heads-longer heads longer "$out/heads-longer/heads.json"
  record heads-narrow heads narrow "$out/heads-narrow/heads.json"
  record heads-bccd heads bccd "$out/heads-bccd/heads.json"
  record factors heads factors "$out/factors/heads.json"
  record balance figure "$out/figures/balance-weights.json"
  for figure in sliding-windows pearson; do record figures figure "$out/figures/$figure.json"; done
  cp "$out/conv_norms.json" evidence/records/
  python evidence/tables.py
}

for part in $parts; do
  begun=$SECONDS
  $part
  printf '%s\t%s\n' "$part" $((SECONDS - begun)) >> "$out/seconds.tsv"
done
