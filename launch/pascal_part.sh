#!/usr/bin/env bash
# The PASCAL-Part benchmark of Choudhury et al. (NeurIPS 2021, Table 4): ten classes, one model for each, K = 4. It prints
# our scores in one table with the published ones.
#   bash launch/pascal_part.sh DATA [setting=value ...]
# DATA holds VOC2010 and PASCAL-Part, as folders or as the official archives. OUT is the folder for everything it makes,
# CLASSES names fewer classes (with spaces between them), and TEACHER_WEIGHTS is a VGG19 file to use instead of
# torchvision's download. If it is interrupted, start it again: it continues where it was.
data=$(realpath "${1:?give the folder of VOC2010 and PASCAL-Part}")
shift
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
out=${OUT:-runs/pascal-part}
classes=${CLASSES:-sheep horse cow motorbike aeroplane bus car bicycle dog cat}
scores=()
for class in $classes; do
  shards=$out/shards/$class run=$out/$class
  mkdir -p "$out/shards"
  python -m slotscops.shard --root "$data" --classes "$class" --out "$shards" --no-features
  python -m slotscops.features --shards "$shards" --layer relu5_2 --size 256 --teacher-weights "${TEACHER_WEIGHTS:-imagenet}"
  accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no launch/train.py \
    --config configs/pascal-part.yaml --resume auto run_dir="$run" data.shards="$shards" "$@"
  python -m slotscops.evaluate --checkpoint "$run" --shards "$shards" --baseline position,kmeans,dff \
    --transform sqrt_l2 --refinement pamr --json "$run/scores.json"
  scores+=("$run/scores.json")
done
python -m slotscops.evaluate --full --read "${scores[@]}"
