#!/usr/bin/env bash
# The PASCAL-Part benchmark of Choudhury et al. (NeurIPS 2021, Table 4): ten classes, one model for each, K = 4. It ends
# with one page, OUT/index.html: our scores beside the published ones, pictures of each class, and what it cost.
#   bash launch/pascal_part.sh DATA [setting=value ...]
# DATA holds VOC2010 and PASCAL-Part, as folders or as the official archives. Settings, such as data.size=224, go to each
# command. Variables:
#   OUT               folder for everything it makes (runs/pascal-part)
#   CLASSES           fewer classes, with spaces between them
#   CONFIG            the recipe, a file or a name (pascal-part, whose teacher is VGG19); with DINOv2 as the teacher:
#                     CONFIG=best-cpu-masks BASELINES="--baseline position,kmeans" bash launch/pascal_part.sh DATA slots.num_parts=4
#   BASELINES         options of evaluate for the methods scored beside it (--baseline position,kmeans,dff --transform sqrt_l2)
#   TEACHER_WEIGHTS   a file of the teacher's weights to use instead of the download
#   CONTEXT           how much the crops show around an object, as for shard --context (0.05)
#   ENVIRONMENT       "current" takes the Python on the PATH instead of making .venv
# If it is interrupted, start it again: finished steps are skipped, and a training continues exactly where it was.
data=$(realpath "${1:?give the folder of VOC2010 and PASCAL-Part}")
shift
if [ -f "${CONFIG:-}" ]; then CONFIG=$(realpath "$CONFIG"); fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "[timm]"
out=${OUT:-runs/pascal-part}
classes=${CLASSES:-sheep horse cow motorbike aeroplane bus car bicycle dog cat}
config=${CONFIG:-pascal-part}
read -ra baselines <<<"${BASELINES:---baseline position,kmeans,dff --transform sqrt_l2}"
weights=(${TEACHER_WEIGHTS:+--teacher-weights "$TEACHER_WEIGHTS"})

# timed STAGE FOLDER FILE COMMAND... runs a command and notes in the run's folder how many seconds it took, if it has
# written a FILE in FOLDER or has failed. A command that finds its work done writes nothing.
timed() {
  local stage=$1 folder=$2 file=$3 start=${EPOCHREALTIME//[!0-9]/} status=0
  shift 3
  touch "$run/.started"
  "$@" || status=$?
  local microseconds=$((${EPOCHREALTIME//[!0-9]/} - start))
  if [ $status -ne 0 ] || [ -n "$(find "$folder" -name "$file" -newer "$run/.started")" ]; then
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
  timed shard "$shards" dataset.json python -m slotscops.shard --root "$data" --classes "$class" \
    --out "$shards" --no-features --context "${CONTEXT:-0.05}" --config "$config" "$@"
  timed features "$shards" manifest.json python -m slotscops.features --shards "$shards" "${weights[@]}" \
    --config "$config" "$@"
  timed train "$run" metrics.jsonl accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no \
    --dynamo_backend no launch/train.py --config "$config" --resume auto "$@" run_dir="$run" data.shards="$shards"
  newest=$(ls -td "$run"/checkpoints/step-* | head -n 1)
  if [ ! "$run/scores.json" -nt "$newest" ]; then
    timed evaluate "$run" scores.json python -m slotscops.evaluate --checkpoint "$run" --shards "$shards" \
      "${baselines[@]}" --refinement pamr --photos "$data" "${weights[@]}" --json "$run/scores.json"
  fi
  scores+=("$run/scores.json")
done
python -m slotscops.evaluate --full --read "${scores[@]}" --page "$out/index.html"
