#!/usr/bin/env bash
# The paper's run on AIME: DeepScaleR-1.5B-Preview, 919 problems, 16,384 tokens.
# Options: bash run_scripts/gcpo_deepscaler.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" deepscaler "$@"
