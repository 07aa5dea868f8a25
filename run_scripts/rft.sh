#!/usr/bin/env bash
# Rejection-sampling fine-tuning: sample, keep the right solutions, fine-tune, repeated.
# Options: bash run_scripts/rest_mcts.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/rest_mcts.sh" "$@" --method rft
