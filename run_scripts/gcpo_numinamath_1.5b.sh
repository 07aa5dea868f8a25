#!/usr/bin/env bash
# The paper's run on NuminaMath: DeepSeek-R1-Distill-Qwen-1.5B, 4,000 random problems, 16,384 tokens.
# Options: bash run_scripts/gcpo_numinamath_1.5b.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" numinamath_1.5b "$@"
