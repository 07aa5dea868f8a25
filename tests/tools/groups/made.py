"""Runs with a rollout dump as our trainer writes it, with texts that a test chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

N = 4
HOSTILE = {
    "script": "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">",
    "end of the data": "</script><script>document.title='owned'</script><!--<script>",
    "terminal": "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b31m\r\x08\x7f[bold]markup[/bold] :smile: [link=http://x]y[/link]",
    "zero": "a\x00b",
    "half a pair": "a\ud800b",
    "right to left": "abc\u202edcba\u2066 \u05d0\u05d1 \u200f",
    "separators": "a\u2028b\u2029c",
    "template": "{{ 7 * 7 }}{% raw %} ${7*7} javascript:alert(1)",
    "long": "0123456789" * 100_000,
}
"""Outputs that a page, a terminal or a parser could obey."""


def response(group: str, index: int, text: str, **keys: Any) -> dict[str, Any]:
    """A line of the dump."""
    line = {
        "input": f"user\nquestion {group}\nassistant\n",
        "output": text,
        "gts": "35",
        "score": float(index % 2),
        "step": 1,
        "group": group,
        "index": index,
        "question": 7,
        "grpo_advantage": (-1) ** (index + 1) * 0.866,
        "advantage": (-1) ** (index + 1) * 1.5,
        "upsilon": 1.5 + 0.1 * index,
        "has_target": True,
        "kappa_kl": 0.0123,
        "block": text,
        "padding": False,
        "uid": f"{group}_{index}_0",
    }
    return {**line, **keys}


def draw(group: str, number: int, text: str, **keys: Any) -> dict[str, Any]:
    """A line of the dump of the auxiliary generations."""
    line = {
        "input": f"user\nquestion {group}\nassistant\n",
        "output": text,
        "gts": None,
        "score": None,
        "step": 1,
        "uid": group,
        "draw": number,
        "kind": "collider",
        "outcome": "ok",
        "left_out": None,
        "prompt": [f"response {k}" for k in range(N)],
        "block": text,
    }
    return {**line, **keys}


def write(folder: Path, step: int, lines: list[dict[str, Any]], draws: list[dict[str, Any]] | None = None) -> None:
    """Write the files of a step as verl writes them, but with escapes for what UTF-8 does not have."""
    for path, entries in ((folder / f"{step}.jsonl", lines), (folder / "auxiliary" / f"{step}.jsonl", draws or [])):
        if entries:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({**entry, "step": step}) + "\n" for entry in entries))


def run_of(folder: Path, texts: list[str], groups: int = 1) -> Path:
    """A run of one step whose groups have these texts as prompts, responses, tokens, episodes, draws and blocks."""
    lines, draws = [], []
    for g in range(groups):
        name = f"g{g}"
        for i in range(N):
            text = texts[(g + i) % len(texts)]
            short = text[:2000]
            extra = {
                "input": text,
                "question": 100 + g,
                "gts": short,
                "tokens": [short, *"tokens"],
                "log_rho": [None, 1.0, -2.0, 0.5, float("nan"), 0.0, 3.0],
                "episodes": [{"text": short, "robustness": 0.9, "effectiveness": 0.25}],
            }
            lines.append(response(name, i, text, **extra))
        draws += [draw(name, j, texts[(g + j) % len(texts)], kind=texts[g % len(texts)][:40]) for j in range(2)]
        draws[-1] |= {"prompt": ["response 1", "draw 0"], "left_out": 0, "kind": "regenerated"}
    write(folder / "rollouts", 1, lines, draws)
    metrics = [{"step": step, "data": {"critic/score/mean": 0.4 + step / 10}} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder
