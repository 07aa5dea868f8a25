#!/usr/bin/env bash
# Plain GRPO with the settings of gcpo_code_qwen2_7b.sh.
# Options: bash run_scripts/grpo_code_qwen2_7b.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" code_qwen2_7b --method grpo "$@"
