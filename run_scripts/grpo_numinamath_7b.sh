#!/usr/bin/env bash
# Plain GRPO with the settings of gcpo_numinamath_7b.sh, to compare with: the same arguments.
exec bash "$(dirname "${BASH_SOURCE[0]}")/gcpo_numinamath_7b.sh" --method grpo "$@"
