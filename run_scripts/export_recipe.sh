#!/usr/bin/env bash
# Assembles OUT/gcpo, a folder for the repository verl-recipe that needs nothing else of this one: the recipe of
# recipe/gcpo, the packages that its imports reach, and their tests. OUT/gcpo must not exist.
#
#   bash run_scripts/export_recipe.sh OUT
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

case "${1:-}" in
    -h | --help) print_help; exit 0 ;;
    "") die "no folder was given (see --help)" 2 ;;
esac
case "$1" in /*) OUT="$1" ;; *) OUT="$CALLER/$1" ;; esac

prefer_cpu "the export needs no GPU"
ensure_environment
exec "$PY" -m run_scripts.export_recipe "$OUT" "${@:2}"
