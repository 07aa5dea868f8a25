#!/usr/bin/env bash
# Trains with GC2PO: run_gcpo.sh with another method and nothing else changed.
METHOD=gc2po exec bash "$(dirname "${BASH_SOURCE[0]}")/run_gcpo.sh" "$@"
