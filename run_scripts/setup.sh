#!/usr/bin/env bash
# Makes the project's environment (.venv, for GPUs .venv-gpu) and installs the pinned packages of
# requirements/<profile>.txt into it. It is repeated only when the lock, pyproject.toml, the profile or the interpreter
# changes.
#
#   bash run_scripts/setup.sh
#
# Environment variables, all optional:
#   GCPO_PROFILE=cpu|gpu    which set of packages (default: gpu where nvidia-smi lists a GPU, else cpu)
#   GCPO_PYTHON=PATH        the Python 3.11 or 3.12 to use (default: the first one found)
#   GCPO_VENV=DIR           where the environment is made
#   GCPO_SKIP_SETUP=1       the other run scripts leave this one out: GCPO_VENV, or `python`, is used as it is
#   GCPO_INSTALLER=pip      leave uv out even where it is installed
#   GCPO_TORCH_INDEX_URL=URL  a package index that has the CPU build of torch, for installs with pip
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

python_is_fit() { # whether "$1" is a CPython 3.11 or 3.12
    "$1" -c 'import platform, sys
sys.exit(not ((3, 11) <= sys.version_info < (3, 13) and platform.python_implementation() == "CPython"))' 2>/dev/null
}

find_python() { # prints the first fit interpreter, or nothing
    local candidate
    for candidate in python3.11 python3.12 python3 python /usr/bin/python3.11 /usr/bin/python3.12 /usr/bin/python3; do
        if python_is_fit "$candidate"; then command -v "$candidate" && return; fi
    done
}

find_uv() { # sets the array UV; empty without uv
    local candidate
    UV=()
    [ "${GCPO_INSTALLER:-}" != pip ] || return 0
    for candidate in uv "python3 -m uv" "$VENV/bin/uv"; do
        if $candidate --version >/dev/null 2>&1; then read -ra UV <<< "$candidate" && return; fi
    done
}

pip_setting() { # a setting of the user's pip, or nothing
    { "${BASE_PYTHON:-python3}" -m pip config get "$1" 2>/dev/null || true; } | tr '\n' ' '
}

fingerprint() {
    { printf '%s %s\n' "$GCPO_PROFILE" "$("$VENV/bin/python" -VV 2>&1 | tr '\n' ' ')"; cat "$LOCK" pyproject.toml; } |
        sha256sum | cut -d' ' -f1
}

# Makes the environment without packages, and finds or installs uv.
make_environment() {
    BASE_PYTHON="${GCPO_PYTHON:-$(find_python)}"
    [ -z "$BASE_PYTHON" ] || python_is_fit "$BASE_PYTHON" || die "GCPO_PYTHON=$GCPO_PYTHON is no CPython 3.11 or 3.12"
    if [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/.gcpo-profile" 2>/dev/null)" != "$GCPO_PROFILE" ]; then
        [ -f "$VENV/.gcpo-profile" ] ||
            die "$VENV is an environment that this script did not make; move it away or set GCPO_VENV"
        say "$VENV holds the other profile: made anew"
        rm -rf "$VENV"
    fi
    find_uv
    mkdir -p "$VENV"
    printf '%s\n' "$GCPO_PROFILE" > "$VENV/.gcpo-profile"
    if ! python_is_fit "$VENV/bin/python"; then
        say "making $VENV with ${BASE_PYTHON:-a Python that uv fetches}"
        if [ "${#UV[@]}" -gt 0 ]; then
            "${UV[@]}" venv --quiet --allow-existing --python "${BASE_PYTHON:->=3.11,<3.13}" "$VENV" ||
                die "no Python 3.11 or 3.12 was found and uv could not fetch one; install one or set GCPO_PYTHON"
        else
            [ -n "$BASE_PYTHON" ] || die "no Python 3.11 or 3.12 was found; install one, install uv, or set GCPO_PYTHON"
            "$BASE_PYTHON" -m venv "$VENV" ||
                die "$BASE_PYTHON can't make an environment; install its venv module (Debian: python3-venv) or uv"
        fi
    fi
    if [ "${#UV[@]}" -eq 0 ] && [ "${GCPO_INSTALLER:-}" != pip ]; then
        say "no uv here: trying to install it into the environment (pip does the work otherwise)"
        "$VENV/bin/python" -m pip install --quiet uv >/dev/null 2>&1 || true
        find_uv
    fi
}

install() { # install ARGUMENTS...: with uv or pip, into the environment
    if [ "${#UV[@]}" -gt 0 ]; then
        "${UV[@]}" pip install --python "$VENV/bin/python" "${SOURCES[@]}" "$@"
    else
        "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off "${SOURCES[@]}" "$@"
    fi
}

# Sets LINKS and SOURCES, where packages come from. uv does not read pip's settings, so they are passed on to it.
choose_sources() {
    local link
    LINKS="${PIP_FIND_LINKS:-$(pip_setting global.find-links)}"
    SOURCES=()
    if [ "${#UV[@]}" -eq 0 ]; then
        if [ "$GCPO_PROFILE" = cpu ] && [ -n "${GCPO_TORCH_INDEX_URL:-}" ]; then
            SOURCES=(--extra-index-url "$GCPO_TORCH_INDEX_URL")
        fi
        return
    fi
    for link in $LINKS; do SOURCES+=(--find-links "$link"); done
    if [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
        link="${PIP_INDEX_URL:-$(pip_setting global.index-url)}"
        link="${link%% *}"
        [ -z "$link" ] || SOURCES+=(--default-index "$link")
    fi
    SOURCES+=(--compile-bytecode)
}

torch_version() { sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$LOCK"; }

local_cpu_torch() { # whether a local directory that pip or uv reads holds the CPU build of torch for this interpreter
    local link tag
    tag="$("$VENV/bin/python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')"
    for link in $LINKS $(tr , " " <<< "${UV_FIND_LINKS:-}"); do
        if compgen -G "${link#file://}/torch-$(torch_version)+cpu-$tag-*.whl" >/dev/null; then return 0; fi
    done
    return 1
}

install_cpu() {
    if [ "${#UV[@]}" -gt 0 ] && ! local_cpu_torch && [ -z "${UV_TORCH_BACKEND:-}" ]; then
        # PyTorch's own index has the CPU build. If it can't be reached, the default build runs on the CPU as well.
        install --no-deps --torch-backend cpu -r "$LOCK" && return
        say "PyTorch's CPU index did not answer: taking the default build of torch, which is larger"
    fi
    install --no-deps -r "$LOCK"
}

install_gpu() {
    grep -v '^flash-attn==' "$LOCK" > "$VENV/.gcpo-lock.txt"
    install --no-deps -r "$VENV/.gcpo-lock.txt" || return 1
    # flash-attn is published as source: it is built against the torch that was just installed.
    install --no-deps --no-build-isolation "$(grep '^flash-attn==' "$LOCK" | cut -d' ' -f1)" ||
        die "flash-attn could not be built (it needs nvcc of CUDA 13 and some minutes); put a wheel for this torch into \
a directory, name that in PIP_FIND_LINKS and run this again"
}

main() {
    LOCK="$ROOT/requirements/$GCPO_PROFILE.txt"
    [ "$(uname -s)" = Linux ] || die "gcpo runs on Linux; this is $(uname -s)"
    [ "$(uname -m)" = x86_64 ] || say "warning: the pinned packages are for x86-64; this is $(uname -m)"

    if [ -f "$STAMP" ] && [ -x "$VENV/bin/python" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ]; then
        say "environment: $VENV, $GCPO_PROFILE profile ($GCPO_PROFILE_REASON), up to date"
        return
    fi
    say "environment: $VENV, $GCPO_PROFILE profile ($GCPO_PROFILE_REASON)"
    local started=$SECONDS
    make_environment
    choose_sources
    say "installing $(grep -c '==' "$LOCK") pinned packages (the first time this downloads a few hundred MB)"
    "install_$GCPO_PROFILE" ||
        die "the packages of $LOCK could not be installed; the lines above say why (run this again to go on)"
    install --no-deps --no-build-isolation --editable "$ROOT"
    if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
        say "torch is the CUDA build here: adding the libraries that it loads"
        install "torch==$(torch_version)" ||
            die "torch is installed but can't be imported, and its libraries could not be added"
        "$VENV/bin/python" -c 'import torch' || die "torch is installed but can't be imported"
    fi
    fingerprint > "$STAMP"
    say "environment ready in $((SECONDS - started)) s"
}

choose_profile
STAMP="$VENV/.gcpo-installed"
mkdir -p "$(dirname "$VENV")"
if command -v flock >/dev/null 2>&1; then
    # Two scripts started together: the second waits for the first instead of installing into the same place.
    exec 9> "$VENV.lock"
    flock --nonblock 9 || { say "another installation is running: waiting for it"; flock 9; }
else
    say "no flock here (util-linux): do not start two installations at once"
fi
main
