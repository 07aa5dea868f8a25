#!/usr/bin/env bash
# GC2PO with the settings of gcpo_numinamath_7b.sh; gc2po.* are its options.
# Options: bash run_scripts/gc2po_numinamath_7b.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" numinamath_7b --method gc2po "$@"
