#!/usr/bin/env bash
# GC2PO with the settings of gcpo_numinamath_1.5b.sh; gc2po.* are its options.
# Options: bash run_scripts/gc2po_numinamath_1.5b.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" numinamath_1.5b --method gc2po "$@"
