#!/usr/bin/env bash
# Plain GRPO with the settings of gcpo_numinamath_7b.sh.
# Options: bash run_scripts/grpo_numinamath_7b.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" numinamath_7b --method grpo "$@"
