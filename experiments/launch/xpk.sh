#!/usr/bin/env bash
# One config as a workload on a GKE cluster that xpk made; restarts resume from the work directory.
#
#   CLUSTER=my-cluster TPU_TYPE=v5litepod-64 IMAGE=us-docker.pkg.dev/… BUCKET=gs://my-bucket/runs \
#     experiments/launch/xpk.sh configs/qwen3_1p7b_math.py [--config.train.steps=200 …]
#
# IMAGE holds this project, installed with the extras tpu, teachers and eval. Keys of an API teacher come from ENV_FILE.
set -euo pipefail

config=${1:?name a config file, for example configs/qwen3_1p7b_math.py}
shift
: "${CLUSTER:?name of the cluster}" "${TPU_TYPE:?for example v5litepod-64}" "${IMAGE:?container image}"
: "${BUCKET:?a gs:// folder for work directories}"
name=$(basename "$config" .py)
workload=${WORKLOAD:-$(tr '_' '-' <<<"$name")}
arguments=$(printf ' %q' "--config=$config" "--workdir=${WORKDIR:-$BUCKET/$name}" "$@")

exec xpk workload create \
  --cluster "$CLUSTER" --workload "$workload" --tpu-type "$TPU_TYPE" --num-slices "${SLICES:-1}" \
  --docker-image "$IMAGE" --max-restarts "${RESTARTS:-20}" ${ENV_FILE:+--env-file "$ENV_FILE"} \
  --command "python -m experiments.train$arguments"
