#!/usr/bin/env bash
# Trains with GRPO, the baseline: run_gcpo.sh with another method and nothing else changed.
METHOD=grpo exec bash "$(dirname "${BASH_SOURCE[0]}")/run_gcpo.sh" "$@"
