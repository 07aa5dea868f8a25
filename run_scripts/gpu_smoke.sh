#!/usr/bin/env bash
# What only a GPU can show, in two parts that download no model and no data. It has not run on a GPU yet.
#
#   bash run_scripts/gpu_smoke.sh            both parts
#   bash run_scripts/gpu_smoke.sh engine     packed passes beside single ones: agreement, seconds, memory; no vLLM
#   bash run_scripts/gpu_smoke.sh loop       five steps of GRPO and of every preset with vLLM
#
# Options behind the name of a part go to it (--help shows them); --cpu runs it small on the CPU. Where torch,
# transformers and verl are installed already, GCPO_SKIP_SETUP=1 runs the engine part with them.
# The tables and the numbers are written to outputs/gpu_smoke/PART.md and PART.json (another folder: --output DIR).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

case "${1:-}" in
    -h | --help) print_help; exit 0 ;;
    "") parts=(engine loop) ;;
    engine | loop) parts=("$1"); shift ;;
    *) die "there is no part '$1'; it must be engine or loop (see --help)" 2 ;;
esac
case " $* " in *" --cpu "*) prefer_cpu "--cpu says so" ;; esac
ensure_environment
status=0
for part in "${parts[@]}"; do
    if [ "$part" = loop ]; then "$PY" -m examples.tasks arithmetic; fi
    "$PY" -m "benchmarks.gpu_smoke.$part" "$@" || status=1
done
exit "$status"
