#!/usr/bin/env bash
# The paper's run on code: Qwen2-7B-Instruct on MBPP, 2,048 tokens.
# Options: bash run_scripts/gcpo_code_qwen2_7b.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" code_qwen2_7b "$@"
