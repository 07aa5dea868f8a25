"""The results of an evaluation in ``results.json``: the metrics of every set, with their values for every question."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcpo.tools.evaluate import EvaluationError, metrics
from gcpo.tools.evaluate.samples import SETTINGS_FILE, read_json, write_json

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Results:
    """Results for every question.

    Attributes:
        questions: results of the samples, by set.
        aggregates: results of the aggregated answers, by set and K.
    """

    questions: dict[str, list[metrics.Question]]
    aggregates: dict[str, dict[int, list[metrics.Aggregate]]]


def write_results(output: Path, results: Results) -> None:
    """Write results; those of other sets and other K stay in the file.

    Raises:
        EvaluationError: the file cannot be read or written.
    """
    path = output / RESULTS_FILE
    sets = read_json(path)["sets"] if path.is_file() else {}
    for name, questions in results.questions.items():
        entry = _entry(metrics.summarize(questions), questions)
        aggregates = {
            str(size): _entry(metrics.summarize_aggregates(found), found)
            for size, found in results.aggregates.get(name, {}).items()
        }
        sets[name] = {**entry, "aggregate": {**sets.get(name, {}).get("aggregate", {}), **aggregates}}
    write_json(path, {"sets": sets})


def _entry(summary: Any, questions: Sequence[Any]) -> dict[str, Any]:
    return {"summary": dataclasses.asdict(summary), "questions": list(map(dataclasses.asdict, questions))}


def read_results(output: Path) -> Results:
    """Return the results of an evaluation.

    Raises:
        EvaluationError: ``output`` holds no finished set.
    """
    path = output / RESULTS_FILE
    if not path.is_file():
        unfinished = (output / SETTINGS_FILE).is_file()
        why = "it is not finished; run it again and it goes on" if unfinished else "give the --output of an evaluation"
        raise EvaluationError(f"{output} holds no results: {why}")
    try:
        sets = read_json(path)["sets"]
        return Results(
            {name: [metrics.Question(**one) for one in found["questions"]] for name, found in sets.items()},
            {
                name: {
                    int(size): [metrics.Aggregate(**one) for one in entry["questions"]]
                    for size, entry in found.get("aggregate", {}).items()
                }
                for name, found in sets.items()
            },
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"{path} is no results file: {error!r}") from error
