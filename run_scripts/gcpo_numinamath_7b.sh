#!/usr/bin/env bash
# The paper's third model: DeepSeek-R1-Distill-Qwen-7B on NuminaMath, 16,384 tokens.
# Options: bash run_scripts/gcpo_numinamath_7b.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" numinamath_7b "$@"
