#!/usr/bin/env bash
# Plain GRPO with the settings of gcpo_numinamath_1.5b.sh.
# Options: bash run_scripts/grpo_numinamath_1.5b.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" numinamath_1.5b --method grpo "$@"
