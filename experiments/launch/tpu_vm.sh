#!/usr/bin/env bash
# One config on every worker of a TPU VM slice, started again after each preemption until the run is done.
#
#   TPU=my-slice ZONE=us-west4-a ACCELERATOR=v5litepod-64 BUCKET=gs://my-bucket/runs \
#     experiments/launch/tpu_vm.sh configs/qwen3_1p7b_math.py [--config.train.steps=200 …]
#
# Needs gcloud, logged in. REPOSITORY is what the workers install; SPOT= (empty) asks for capacity that is not taken back.
set -euo pipefail

config=${1:?name a config file, for example configs/qwen3_1p7b_math.py}
shift
: "${TPU:?name of the TPU VM}" "${ZONE:?for example us-west4-a}" "${ACCELERATOR:?for example v5litepod-64}"
: "${BUCKET:?a gs:// folder for work directories}" "${REPOSITORY:?git address of this project}"
runtime=${RUNTIME:-v2-alpha-tpuv5-lite}
spot=${SPOT---spot}
name=$(basename "$config" .py)
workdir=${WORKDIR:-$BUCKET/$name}

on_all_workers() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"
}

state() {
  gcloud compute tpus tpu-vm describe "$TPU" --zone "$ZONE" --format='value(state)' 2>/dev/null || echo ABSENT
}

install="test -d omniopd || git clone --quiet $(printf %q "$REPOSITORY") omniopd; cd omniopd && \
pip install --quiet -e '.[tpu,teachers,eval]'"
train="cd omniopd && python3 -m experiments.train$(printf ' %q' "--config=$config" "--workdir=$workdir" "$@")"

for ((attempt = 1; attempt <= ${ATTEMPTS:-100}; attempt++)); do
  case $(state) in
    READY) ;;
    ABSENT)
      gcloud compute tpus tpu-vm create "$TPU" --zone "$ZONE" --accelerator-type "$ACCELERATOR" --version "$runtime" \
        ${spot:+"$spot"} || { sleep "${PAUSE:-60}"; continue; }
      ;;
    *) # preempted or broken: such a slice never comes back by itself
      gcloud compute tpus tpu-vm delete "$TPU" --zone "$ZONE" --quiet || true
      continue
      ;;
  esac
  status=0
  { on_all_workers "$install" && on_all_workers "$train"; } || status=$?
  case $status in
    0) echo "done: $workdir"; exit 0 ;;
    2 | 3 | 4 | 5) exit "$status" ;; # bad input, the teacher, a budget, not finite: again would end the same way
  esac
  echo "attempt $attempt ended with $status; the run resumes from $workdir" >&2
  sleep "${PAUSE:-60}"
done
exit 1
