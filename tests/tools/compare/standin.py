"""Stands in for the one-file trainer: the same command line, and metrics that can be computed by hand."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

BETTER = {"grpo": 0.0, "gvpo": 0.02, "gcpo": 0.05}
TOKENS = {"grpo": 100, "gvpo": 100, "gcpo": 300}


def accuracy(method: str, seed: int, step: int) -> float:
    """Rises by 0.01 a step, from 0.5 + seed / 100."""
    return 0.5 + 0.01 * seed + 0.01 * step + (BETTER[method] if step else 0.0)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("method", "model", "data", "output"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("seed", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    settings = {name: json.loads(value) for name, value in (text.split("=", 1) for text in args.settings)}
    with Path("started.txt").open("a") as starts:
        starts.write(f"{args.method} {args.seed} {os.getpid()}\n")
    if settings.get("fail") == args.seed or (settings.get("fail") == "once" and not Path("mended").exists()):
        print("some output")
        print("gcpo_in_one_file: settings.alpha is -1; it must be at least 0", file=sys.stderr)
        sys.exit(2)
    last = args.steps - (settings.get("short") == args.seed)
    with (Path(args.output) / "metrics.jsonl").open("w") as log:
        for step in range(last + 1):
            data: dict[str, float] = {}
            if step:
                data = {"tokens/generated": TOKENS[args.method], "timing_s/step": 0.5, "actor/grad_norm": 1.0 / step}
            if step and args.method == "gcpo":
                data |= {"gcpo/upsilon/mean_above": 1.8, "gcpo/upsilon/mean_below": 1.7 - 0.01 * args.seed}
            if step % 5 == 0 or step == last:
                value = accuracy(args.method, args.seed, step)
                data |= {"val-core/gcpo/arithmetic/acc/mean@1": value, "val-ood/acc/mean@1": value - 0.2}
            log.write(json.dumps({"step": step, "data": data}) + "\n")
            log.flush()
            if step == 1 and settings.get("hang") == args.seed:
                time.sleep(600)


if __name__ == "__main__":
    main()
