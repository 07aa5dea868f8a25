#!/usr/bin/env bash
# Installs what is missing and checks the code. Without arguments all checks run; with names only those.
#
#   bash run_scripts/lint.sh                 all of them
#   bash run_scripts/lint.sh style shell     some of them
#
#   style    ruff: lint and format
#   shell    shellcheck on the scripts
#   docker   hadolint on the Dockerfile
#   yaml     yamllint on the configuration
#   space    no space at the end of a line, one newline at the end of a file
#   types    basedpyright on the package
#   layers   import-linter: who may import whom
#   site     mkdocs: the documentation as a site in outputs/site, with all links, and nothing from other servers
#
# The settings of the tools are in pyproject.toml, their versions in requirements/lint.txt.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

case "${1:-}" in -h | --help) print_help; exit 0 ;; esac

prefer_cpu "the checks need no GPU"
ensure_environment
LINT="$ROOT/.venv-lint"
if ! cmp -s requirements/lint.txt "$LINT/installed.txt"; then
    "$PY" -m venv "$LINT"
    "$LINT/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements/lint.txt
    cp requirements/lint.txt "$LINT/installed.txt"
fi
PATH="$LINT/bin:$PATH"

style() { ruff check . && ruff format --check .; }
shell() { shellcheck -P SCRIPTDIR --external-sources run_scripts/*.sh requirements/*.sh recipe/gcpo/*.sh .ci/run; }
docker() { hadolint run_scripts/Dockerfile; }
yaml() { yamllint --strict gcpo/config recipe .github .pre-commit-config.yaml CITATION.cff mkdocs.yml; }
types() { basedpyright --project pyproject.toml --pythonpath "$PY"; }
layers() { lint-imports; }
site() {
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict || return
    # A reader without a network sees the same pages: no script, style, font or image comes from another server.
    ! grep -rnoE '<(script|link|img|iframe)[^>]* (src|href)="?(https?:)?//[^>]*>' outputs/site --include='*.html'
}
space() {
    "$PY" - <<'PYTHON'
import pathlib, sys

def problems(path):
    text = path.read_text()
    lines = text.split("\n")
    yield from (f"{path}:{at}: a space at the end of the line" for at, x in enumerate(lines, 1) if x != x.rstrip())
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        yield f"{path}: the file should end with one newline"

folders = ("gcpo", "data_prep", "recipe", "run_scripts", "examples", "benchmarks", "tests", "docs", "requirements", ".github")
kinds = {".py", ".md", ".sh", ".yaml", ".yml", ".txt", ".toml", ".cff"}
files = [p for folder in folders for p in pathlib.Path(folder).rglob("*")] + list(pathlib.Path().glob("*"))
found = [line for p in sorted(files) if p.suffix in kinds and p.is_file() for line in problems(p)]
print("\n".join(found), end="\n" if found else "")
sys.exit(bool(found))
PYTHON
}

failed=()
for check in "${@:-style shell docker yaml space types layers site}"; do
    for name in $check; do
        say "== $name"
        declare -F "$name" >/dev/null || die "there is no check '$name' (see --help)" 2
        "$name" || failed+=("$name")
    done
done
[ ${#failed[@]} -eq 0 ] || die "these checks failed: ${failed[*]}"
