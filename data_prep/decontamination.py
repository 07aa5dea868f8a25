"""Decontamination: detection of training problems that an evaluation set also contains, exactly or nearly."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.files import read_file, sha256_of
from data_prep.schema import PROVENANCE, DataError

GRAM = 5
"""Number of words of an n-gram."""
MIN_SHARED = 0.6
"""Two problems are nearly the same if they share at least this fraction of the shorter problem's n-grams."""
FEWEST = 10
"""Lower bound of a problem's n-grams in that fraction, so that a short problem does not match all that contain it."""
QUESTION_COLUMNS = ("question", "problem", "Question", "Problem", "prompt", "text")

_DIAGRAM = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|text|mathrm|mathbf|textbf|mbox|q?quad)(?![A-Za-z])|\\[!,;: ]|[{}$~.,;:?!]"
)
_FRACTION = re.compile(r"\\[dt]frac(?![A-Za-z])")
_WORD = re.compile(r"\\[a-z]+|[^\W\d_]+|\d|[^\s\w]")


def words(question: str) -> list[str]:
    """Return a problem as words, digits and operators, without diagrams, punctuation and layout."""
    text = _FRACTION.sub(r"\\frac ", _DIAGRAM.sub(" ", question))
    return _WORD.findall(_LAYOUT.sub(" ", text).lower())


def key_of(question: str) -> str:
    """Return a key that is equal for problems that differ only in layout."""
    return " ".join(words(question)) or question.strip()


def grams(parts: Sequence[str], size: int = GRAM) -> set[tuple[str, ...]]:
    """Return all runs of ``size`` words; of a shorter text, the text itself."""
    if len(parts) <= size:
        return {tuple(parts)} if parts else set()
    return {tuple(parts[start : start + size]) for start in range(len(parts) - size + 1)}


class EvaluationSets:
    """The problems of evaluation sets, indexed by text and n-grams.

    Attributes:
        origin: the origins of the sets, for the provenance.
    """

    def __init__(self) -> None:
        self.origin: list[dict[str, Any]] = []
        self._places: list[tuple[str, int, str]] = []
        self._sizes: list[int] = []
        self._exact: dict[str, int] = {}
        self._index: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, name: str, questions: Iterable[str]) -> None:
        """Add the problems of a set."""
        for number, question in enumerate(questions):
            place = len(self._places)
            of_question = grams(words(question))
            self._places.append((name, number, question))
            self._sizes.append(len(of_question))
            self._exact.setdefault(key_of(question), place)
            for gram in of_question:
                self._index[gram].append(place)

    def find(self, question: str) -> dict[str, Any] | None:
        """Find an equal or nearly equal problem.

        Returns:
            Its ``set`` and ``set_row``; ``match``: exact (but for white space), letters (the same letters and digits)
            or near; ``shared``: the fraction of the shorter problem's n-grams that the other problem has; or None.
        """
        of_question = grams(words(question))
        if (place := self._exact.get(key_of(question))) is not None:
            return self._result(question, place, 1.0)
        shared = Counter(place for gram in of_question for place in self._index.get(gram, ()))
        fraction, place = max(
            ((n / max(min(len(of_question), self._sizes[at]), FEWEST), -at) for at, n in shared.items()),
            default=(0.0, 0),
        )
        return self._result(question, -place, fraction) if fraction >= MIN_SHARED else None

    def _result(self, question: str, place: int, fraction: float) -> dict[str, Any]:
        name, number, other = self._places[place]
        match = "near"
        if question.split() == other.split():
            match = "exact"
        elif _letters(question) == _letters(other):
            match = "letters"
        return {"set": name, "set_row": number, "match": match, "shared": round(fraction, 3)}


def _letters(question: str) -> str:
    return re.sub(r"[\W_]", "", question.lower())


def load_sets(against: Sequence[str], names: Sequence[str], folder: Path) -> EvaluationSets:
    """Load evaluation sets by name, as prepared in ``folder``, or from any file with problems.

    Args:
        against: names or files; ``auto`` means all prepared sets, ``none`` no set.
        names: names of all evaluation sets.
        folder: the folder of prepared sets.

    Raises:
        DataError: a set does not exist or has no problems.
    """
    sets = EvaluationSets()
    for one in against:
        if one == "none":
            continue
        if one == "auto":
            for name in names:
                if (folder / name / PROVENANCE).is_file():
                    _add_file(sets, name, folder / name / "test.parquet")
        elif one in names:
            path = folder / one / "test.parquet"
            if not path.is_file():
                raise DataError(f"the evaluation set {one} is not prepared: python -m data_prep {one}")
            _add_file(sets, one, path)
        else:
            path = Path(one).expanduser()
            if not path.exists():
                raise DataError(f"{one} is neither an evaluation set ({', '.join(names)}) nor a file")
            _add_file(sets, path.name, path)
    return sets


def _add_file(sets: EvaluationSets, name: str, path: Path) -> None:
    rows, _ = read_file(path)
    rows = rows if isinstance(rows, list) else rows.to_pylist()
    questions = [question for row in rows if (question := _question_of(row))]
    if not questions:
        raise DataError(f"{path} has no problems: none of the columns {', '.join(QUESTION_COLUMNS)} holds text")
    sets.add(name, questions)
    sets.origin.append({"set": name, "file": str(path), "sha256": sha256_of(path), "questions": len(questions)})


def _question_of(row: Mapping[str, Any]) -> str | None:
    extra = row.get("extra_info")
    if isinstance(extra, Mapping) and isinstance(extra.get("question"), str):
        return extra["question"]
    return next((row[column] for column in QUESTION_COLUMNS if isinstance(row.get(column), str) and row[column]), None)
