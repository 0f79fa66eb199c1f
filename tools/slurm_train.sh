#!/usr/bin/env bash
# Trains through Slurm:  tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]
# GPUS (default 8), GPUS_PER_NODE (8), CPUS_PER_TASK (8) and SRUN_ARGS (more options of srun) are
# taken from the environment.
set -euo pipefail

if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]" >&2
    exit 2
fi
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
if [ "$GPUS" -lt "$GPUS_PER_NODE" ]; then
    GPUS_PER_NODE=$GPUS
fi
read -r -a EXTRA <<<"${SRUN_ARGS:-}"

# One failed process must end the job: the others would wait for it.
exec srun \
    --partition="$1" \
    --job-name="$2" \
    --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" \
    --gres="gpu:$GPUS_PER_NODE" \
    --cpus-per-task="${CPUS_PER_TASK:-8}" \
    --kill-on-bad-exit=1 \
    ${EXTRA[@]+"${EXTRA[@]}"} \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$3" \
    --work-dir "$4" --launcher slurm "${@:5}"
