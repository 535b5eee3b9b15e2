#!/usr/bin/env bash
# The PASCAL-Part benchmark of Choudhury et al. (NeurIPS 2021, Table 4): ten classes, one model for each, K = 4. It ends
# with one page, OUT/index.html: our scores beside the published ones, pictures of each class, and what it cost.
#   bash launch/pascal_part.sh DATA [setting=value ...]
# DATA holds VOC2010 and PASCAL-Part, as folders or as the official archives. Variables:
#   OUT               folder for everything it makes (runs/pascal-part)
#   CLASSES           fewer classes, with spaces between them
#   TEACHER_WEIGHTS   a VGG19 file to use instead of torchvision's download
#   CROP, SIZE        pixels of the crops (128), and of the same crops as VGG19 sees them (256)
#   CONTEXT           how much the crops show around an object, as for shard --context (0.05)
#   ENVIRONMENT       "current" takes the Python on the PATH instead of making .venv
# If it is interrupted, start it again: finished steps are skipped, and a training continues exactly where it was.
data=$(realpath "${1:?give the folder of VOC2010 and PASCAL-Part}")
shift
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""
out=${OUT:-runs/pascal-part}
classes=${CLASSES:-sheep horse cow motorbike aeroplane bus car bicycle dog cat}
weights=${TEACHER_WEIGHTS:-imagenet}
crop=${CROP:-128} size=${SIZE:-256}

# timed STAGE FILE COMMAND... runs a command and notes in the run's folder how many seconds it took, if it has written
# FILE or has failed. A command that finds its work done writes nothing.
timed() {
  local stage=$1 file=$2 start=${EPOCHREALTIME//[!0-9]/} status=0
  shift 2
  touch "$run/.started"
  "$@" || status=$?
  local microseconds=$((${EPOCHREALTIME//[!0-9]/} - start))
  if [ $status -ne 0 ] || [ "$file" -nt "$run/.started" ]; then
    printf '{"stage": "%s", "seconds": %d.%06d}\n' "$stage" $((microseconds / 1000000)) $((microseconds % 1000000)) \
      >>"$run/cost.jsonl"
  fi
  rm "$run/.started"
  return $status
}

scores=()
for class in $classes; do
  shards=$out/shards/$class run=$out/$class
  mkdir -p "$out/shards" "$run"
  # Finished shards, features and trainings are found finished by these commands, which also check the settings.
  timed shard "$shards/index/dataset.json" python -m slotscops.shard --root "$data" --classes "$class" \
    --out "$shards" --size "$crop" --no-features --context "${CONTEXT:-0.05}"
  timed features "$shards/features/vgg19-relu5_2-$size/manifest.json" python -m slotscops.features \
    --shards "$shards" --layer relu5_2 --size "$size" --teacher-weights "$weights"
  timed train "$run/metrics.jsonl" accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no \
    --dynamo_backend no launch/train.py --config configs/pascal-part.yaml --resume auto run_dir="$run" \
    data.shards="$shards" data.size="$crop" teacher.size="$size" "$@"
  newest=$(ls -td "$run"/checkpoints/step-* | head -n 1)
  if [ ! "$run/scores.json" -nt "$newest" ]; then
    timed evaluate "$run/scores.json" python -m slotscops.evaluate --checkpoint "$run" --shards "$shards" \
      --baseline position,kmeans,dff --transform sqrt_l2 --refinement pamr \
      --photos "$data" --teacher-weights "$weights" --json "$run/scores.json"
  fi
  scores+=("$run/scores.json")
done
python -m slotscops.evaluate --full --read "${scores[@]}" --page "$out/index.html"
