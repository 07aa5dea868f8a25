"""The groups of a run from verl's rollout dump: one file per step, one line per response."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gcpo.rewards import boxed_answer, normalize
from gcpo.tools.groups.texts import safe

FOLDER_SETTING = "trainer.rollout_data_dir"


class NoGroupsError(Exception):
    """There is nothing to show; the message is one sentence for the user."""


@dataclass
class Group:
    """The responses to one question, with all texts safe to show.

    Attributes:
        step: number of the step.
        question: place of the question in the data set; of an earlier dump the number of the group in its file.
        prompt: the question.
        truth: the right answer, or ``None``.
        responses: the lines of the responses, by index.
        draws: the lines of the auxiliary generations.
    """

    step: int
    question: str
    prompt: str
    truth: Any = None
    responses: list[dict[str, Any]] = field(default_factory=list)
    draws: list[dict[str, Any]] = field(default_factory=list)

    def numbers(self, name: str) -> list[float]:
        """Return the values of a key, of the responses that have it."""
        return [float(line[name]) for line in self.responses if isinstance(line.get(name), int | float)]

    @property
    def reward(self) -> float | None:
        """The mean reward."""
        return statistics.fmean(found) if (found := self.numbers("score")) else None

    @property
    def upsilon_spread(self) -> float | None:
        """The standard deviation of Upsilon over the responses with a target."""
        known = [line for line in self.responses if line.get("has_target")]
        found = Group(self.step, self.question, self.prompt, responses=known).numbers("upsilon")
        return statistics.stdev(found) if len(found) > 1 else None

    @property
    def disagreement(self) -> float | None:
        """The fraction of the pairs of responses whose final answers differ; no answer is an answer of its own kind.

        ``None`` if no response has a boxed answer.
        """
        answers = [boxed_answer(str(line.get("output", ""))) for line in self.responses]
        counts = Counter("" if answer is None else normalize(answer) for answer in answers)
        total = len(answers)
        if total < 2 or not any(answer is not None for answer in answers):
            return None
        return 1 - sum(count * (count - 1) for count in counts.values()) / (total * (total - 1))


def rollout_folder(run: Path) -> Path:
    """Return the folder of the dump of a run.

    Args:
        run: the ``--output`` of a run, or the folder of a dump.

    Raises:
        NoGroupsError: there is no dump.
    """
    from gcpo.tools.launch.state import RunState  # the launcher imports the report

    state = RunState.load(run)
    settings = dict(a.lstrip("+").split("=", 1) for a in (state.command if state else ()) if "=" in a)
    named = [Path(settings[FOLDER_SETTING])] if FOLDER_SETTING in settings else []
    for folder in (*named, run / "rollouts", run):
        if steps_in(folder):
            return folder
    raise NoGroupsError(f"{run} has no rollout dump; train with {FOLDER_SETTING}={run / 'rollouts'}")


def steps_in(folder: Path) -> list[int]:
    """Return the steps that are dumped in a folder, in order."""
    return sorted(int(path.stem) for path in folder.glob("*.jsonl") if path.stem.isdecimal())


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of a dump, with all texts safe to show, and the number of lines that are not JSON objects."""
    try:
        texts = path.read_bytes().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return [], 0
    lines, bad = [], 0
    for text in filter(str.strip, texts):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict):
            lines.append(safe(line))
        else:
            bad += 1
    return lines, bad


def read_step(folder: Path, step: int) -> tuple[list[Group], int]:
    """Return the groups of a step in the order of the file, and the number of unreadable lines."""
    lines, bad = read_lines(folder / f"{step}.jsonl")
    draws, bad_draws = read_lines(folder / "auxiliary" / f"{step}.jsonl")
    groups: dict[str, Group] = {}
    for line in lines:
        if line.get("padding"):
            continue
        # Other trainers of verl write no group; their key of a row is {group}_{response}_{output}.
        uid = str(line.get("group") or str(line.get("uid", line.get("input"))).rsplit("_", 2)[0])
        question = line.get("question")
        if uid not in groups:
            number = str(len(groups) if question is None else question)
            groups[uid] = Group(step, number, str(line.get("input", "")), line.get("gts"))
        groups[uid].responses.append(line)
    for draw in draws:
        if draw.get("uid") in groups:
            groups[draw["uid"]].draws.append(draw)
    return list(groups.values()), bad + bad_draws


def read_groups(folder: Path, limit: int, max_bytes: int) -> Iterator[Group]:
    """Yield at most ``limit`` groups of steps with even distances, the first and the last step among them.

    It ends with the first step after which the files that it read have more than ``max_bytes``.
    """
    steps = steps_in(folder)
    first, _ = read_step(folder, steps[0])
    count = max(1, min(len(steps), limit // max(len(first), 1)))
    size = left = 0
    for step in spread(steps, count):
        groups, _ = read_step(folder, step)
        yield from groups[: limit - left]
        left += len(groups)
        paths = (folder / f"{step}.jsonl", folder / "auxiliary" / f"{step}.jsonl")
        size += sum(path.stat().st_size for path in paths if path.is_file())
        if left >= limit or size > max_bytes:
            return


def spread(steps: Sequence[int], count: int) -> list[int]:
    """Return ``count`` of the steps with even distances."""
    if count == 1:
        return list(steps[-1:])
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]
