#!/usr/bin/env bash
# From nothing to parts on a laptop: environment, toy photos, shards, features, training, scores, pictures.
# With TEACHER_WEIGHTS=imagenet (torchvision downloads VGG19, 575 MB) or TEACHER_WEIGHTS=FILE the features are real. The
# default, random:0, needs no network and is good for a first look only. OUT is the folder for everything it makes.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
out=${OUT:-runs/demo}
mkdir -p "$out"
python -m slotscops.shard --toy --out "$out/shards" --teacher-weights "${TEACHER_WEIGHTS:-random:0}"
accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no launch/train.py \
  --config configs/toy.yaml run_dir="$out/run" data.shards="$out/shards" "$@"
python -m slotscops.evaluate --checkpoint "$out/run" --baseline position,kmeans,dff --shards "$out/shards"
python -m slotscops.segment --checkpoint "$out/run" --out "$out/pictures" \
  ${TEACHER_WEIGHTS:+--teacher-weights "$TEACHER_WEIGHTS"} "$out"/shards/photos/VOCdevkit/VOC2010/JPEGImages/toy_50000*.jpg
latest=$(ls -t "$out"/run/pictures/*.png | head -n 1)
echo "parts of whole photos: $out/pictures; crops, parts found, true parts: $latest"
