#!/usr/bin/env bash
# Writes requirements/cpu.txt and requirements/gpu.txt anew from pyproject.toml (a maintainer's tool; needs uv).
# Pins that still fit are kept; `bash requirements/lock.sh --upgrade` moves them. Other arguments go to uv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for profile in cpu gpu; do
    out="requirements/${profile}.txt"
    uv pip compile pyproject.toml --extra "$profile" --extra test --extra dev \
        --universal --python-version 3.11 --no-header --no-annotate --quiet --output-file "$out" "$@"
    # Every line is for Linux on x86-64 and CPython 3.11 or 3.12: only what tells the two apart stays in the markers.
    sed -E -i \
        -e "s/ and platform_machine == 'x86_64'//; s/ and sys_platform == 'linux'//" \
        -e "/^(cffi|pycparser|uvloop)==/s/ ;.*//" \
        -e "s/ ; python_full_version < '3.13'( and platform_python_implementation != 'PyPy')?\$//" \
        -e "s/^(torch==[0-9.]+)\+cpu/\1/" "$out"
    if [ "$profile" = cpu ]; then
        # The CPU build of torch needs no CUDA libraries; where only the CUDA build is to be had, setup.sh adds them.
        sed -E -i '/^(nvidia-|cuda-)/d' "$out"
    fi
    {
        echo "# Every package of the ${profile} profile, for Linux on x86-64 and Python 3.11 or 3.12."
        echo "# Made by requirements/lock.sh from pyproject.toml; install with --no-deps (run_scripts/setup.sh does)."
        cat "$out"
    } > "$out.tmp"
    mv "$out.tmp" "$out"
    echo "$out: $(grep -c '==' "$out") packages"
done
