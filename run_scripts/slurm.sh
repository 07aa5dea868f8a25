#!/usr/bin/env bash
#SBATCH --job-name=gcpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=outputs/slurm-%j.log
# Trains an experiment on the machines of a Slurm job: Ray's head and the trainer on the first, a Ray worker on each
# other. It has not run on a cluster yet. Submit it in the root of the repository:
#
#   sbatch --nodes 4 --gpus-per-node 8 run_scripts/slurm.sh deepscaler --method gcpo [options of run_scripts/train.sh]
#
# All machines need this folder, its environment (bash run_scripts/setup.sh, once, on a machine with a GPU), and the
# data and the model, at the same places. RAY_PORT (default 6379) is the port of Ray's head.
set -euo pipefail
# Slurm runs a copy of this file from a folder of its own.
source "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}/run_scripts/_common.sh"

case "${1:-}" in -h | --help) print_help; exit 0 ;; esac
[ -n "${SLURM_JOB_NODELIST:-}" ] || die "this is no Slurm job; submit it with sbatch (see --help)" 2
[ -n "${SLURM_GPUS_ON_NODE:-}" ] || die "the job has no GPUs; submit it with --gpus-per-node" 2
choose_profile
export GCPO_PROFILE VENV
RAY="$VENV/bin/ray"
[ -x "$RAY" ] || die "$RAY is missing; run 'bash run_scripts/setup.sh' on a machine with a GPU first"

mapfile -t MACHINES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
COUNT="${#MACHINES[@]}"
HEAD="${MACHINES[0]}"
PORT="${RAY_PORT:-6379}"
export RAY_ADDRESS="$HEAD:$PORT"
stop() { srun --overlap --ntasks-per-node=1 "$RAY" stop >/dev/null 2>&1 || true; }
trap stop EXIT

say "Ray's head: $RAY_ADDRESS; machines: ${MACHINES[*]}"
srun --overlap --nodes=1 --ntasks=1 --nodelist="$HEAD" "$RAY" start --head --port="$PORT" --disable-usage-stats --block &
await() { # await COUNT: until so many machines have joined
    local joined=0
    for _ in $(seq 60); do
        joined="$("$RAY" list nodes --filter state=ALIVE --format json 2>/dev/null | grep -c '"node_id"' || true)"
        [ "$joined" -lt "$1" ] || return 0
        sleep 5
    done
    die "only $joined of $1 machines joined Ray's head $RAY_ADDRESS within five minutes; see the output of 'ray start' above"
}
await 1
if [ "$COUNT" -gt 1 ]; then
    srun --overlap --nodes="$((COUNT - 1))" --ntasks="$((COUNT - 1))" --exclude="$HEAD" \
        "$RAY" start --address="$RAY_ADDRESS" --disable-usage-stats --block &
fi
await "$COUNT"
srun --overlap --nodes=1 --ntasks=1 --nodelist="$HEAD" \
    bash run_scripts/train.sh "$@" --nodes "$COUNT" --gpus "${SLURM_GPUS_ON_NODE##*:}"
