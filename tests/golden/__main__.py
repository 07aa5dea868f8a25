"""Golden runs: ``python -m tests.golden renew`` writes them, ``python -m tests.golden check`` compares bit for bit.

A refactoring must pass ``check`` on the machine that wrote the files. A commit that changes the numbers on purpose
renews them and says why.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.golden.runs import RUNS, differences, file_of, make_model, run_here


def main(arguments: list[str]) -> int:
    if arguments[:1] not in (["renew"], ["check"]):
        print(__doc__, file=sys.stderr)
        return 2
    names, status = arguments[1:] or list(RUNS), 0
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        for name in names:
            result = run_here(name, model)
            if arguments[0] == "renew":
                file_of(name).write_text(json.dumps(result, indent=1) + "\n")
                print(f"{name}: written to {file_of(name)}")
                continue
            found = differences(json.loads(file_of(name).read_text()), result)
            status = status or int(bool(found))
            print(f"{name}: " + ("identical" if not found else f"{len(found)} differences, the first: {found[0]}"))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
