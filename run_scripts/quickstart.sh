#!/usr/bin/env bash
# The quick start: installs, makes arithmetic questions and a small fine-tuned model, and trains it with GCPO.
# Options: bash run_scripts/quickstart.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" arithmetic "$@"
