#!/usr/bin/env bash
# GC2PO with the settings of gcpo_deepscaler.sh; gc2po.* are its options.
# Options: bash run_scripts/gc2po_deepscaler.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" deepscaler --method gc2po "$@"
