#!/usr/bin/env bash
# Plain GRPO with the settings of gcpo_deepscaler.sh.
# Options: bash run_scripts/grpo_deepscaler.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" deepscaler --method grpo "$@"
