"""Question sets: what can be named, where it lies, and what a question is.

A set is a parquet file in verl's schema, as ``python -m data_prep NAME`` writes it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gcpo.tools.evaluate import EvaluationError

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / os.environ.get("GCPO_DATA", "data")
COLUMNS = ("data_source", "prompt", "reward_model")

TITLES = {
    "aime24": "AIME 2024",
    "aime25": "AIME 2025",
    "amc23": "AMC 2023",
    "math500": "MATH500",
    "minerva": "MinervaMATH",
    "humaneval": "HumanEval 0-shot",
    "humaneval_5shot": "HumanEval 5-shot",
    "mbpp_test": "MBPP",
    "gsm8k": "GSM8K",
    "arithmetic": "arithmetic",
}
"""Sets that can be named, in the order of a table's columns."""
TABLE_1 = ("aime24", "aime25", "amc23", "math500", "minerva")
"""The sets of the paper's Table 1, whose unweighted mean is its last column."""


@dataclass(frozen=True)
class Question:
    """A question as its file has it.

    Attributes:
        id: a digest of the question and its answer: the same wherever the file lies and whatever stands beside it.
        row: its row in the file.
        prompt: messages of a chat.
        data_source: chooses the grader.
        ground_truth: what the grader is given.
        extra_info: the same.
        has_answer: whether a response ends in an answer that can be compared with another's; code doesn't.
    """

    id: str
    row: int
    prompt: list[dict[str, Any]]
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any]
    has_answer: bool


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a file.

    Attributes:
        name: short; the samples' file is called by it.
        path: the parquet file.
        sha256: of the file.
        questions: in the order of the file.
    """

    name: str
    path: Path
    sha256: str
    questions: list[Question]


def load_sets(names: Sequence[str], limit: int | None = None, data: Path = DATA) -> list[QuestionSet]:
    """The sets called by name or by file.

    Args:
        names: of `TITLES`, or paths of parquet files.
        limit: how many questions of every set, the first ones; ``None``: all.
        data: where ``python -m data_prep`` puts prepared sets.

    Raises:
        EvaluationError: a set is unknown or not prepared, a file is not one, or two sets have the same name.
    """
    if not names:
        raise EvaluationError("no question set is named; give --sets, for example --sets aime24,math500")
    sets = [_load(*_find(name, data), limit) for name in dict.fromkeys(names)]
    for name, count in Counter(found.name for found in sets).items():
        if count > 1:
            paths = " and ".join(str(found.path) for found in sets if found.name == name)
            raise EvaluationError(f"{paths} would both be called {name}; rename one of the files")
    return sets


def _find(name: str, data: Path) -> tuple[str, Path]:
    if name in TITLES:
        path = data / name / "test.parquet"
        if not path.is_file():
            module = f"data_prep {name}"
            if name == "arithmetic":
                module = "examples.arithmetic.task --output data/arithmetic"
            raise EvaluationError(f"the set {name} is not prepared ({path} is missing); run `python -m {module}` first")
        return name, path
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "test.parquet"
    if path.suffix != ".parquet":
        raise EvaluationError(f"{name} is no known set and no parquet file; the sets are {', '.join(TITLES)}")
    if not path.is_file():
        raise EvaluationError(f"there is no file {path}; `python -m data_prep` makes the known sets")
    # data_prep calls its files by their split, and the folder by the set.
    return (path.stem if path.stem not in ("train", "test") else path.resolve().parent.name), path


def _load(name: str, path: Path, limit: int | None) -> QuestionSet:
    import pyarrow.parquet as pq

    try:
        content = path.read_bytes()
        table = pq.ParquetFile(path).read()
    except (OSError, ValueError) as error:  # pyarrow's errors are both
        raise EvaluationError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from error
    missing = [column for column in COLUMNS if column not in table.column_names]
    if missing:
        raise EvaluationError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has "
            f"{', '.join(table.column_names)}"
        )
    rows = table.slice(0, limit).to_pylist()
    if not rows:
        raise EvaluationError(f"{path} has no rows")
    seen: Counter[str] = Counter()
    questions = []
    for index, row in enumerate(rows):
        question = _question(row, index, path)
        seen[question.id] += 1
        again = seen[question.id]
        questions.append(replace(question, id=f"{question.id}-{again}") if again > 1 else question)
    return QuestionSet(name, path, hashlib.sha256(content).hexdigest(), questions)


def _question(row: Mapping[str, Any], index: int, path: Path) -> Question:
    prompt, reward, source = row["prompt"], row["reward_model"], str(row["data_source"])
    if not isinstance(prompt, list) or not prompt or not all(map(_is_message, prompt)):
        raise EvaluationError(f"the prompt in row {index} of {path} is empty or no list of messages")
    if not isinstance(reward, Mapping) or reward.get("ground_truth") is None:
        raise EvaluationError(f"row {index} of {path} has no reward_model.ground_truth to grade with")
    truth = reward["ground_truth"]
    identity = json.dumps([source, prompt, truth], sort_keys=True, default=str)
    id = hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()
    return Question(id, index, prompt, source, truth, row.get("extra_info") or {}, row.get("ability") != "code")


def _is_message(message: Any) -> bool:
    found = message if isinstance(message, Mapping) else {}
    return all(isinstance(found.get(key), str) for key in ("role", "content")) and bool(found["content"].strip())
