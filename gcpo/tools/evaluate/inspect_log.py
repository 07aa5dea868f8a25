"""Samples of an evaluation as logs of Inspect (https://inspect.aisi.org.uk), one per set; inspect_ai writes them."""
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import gcpo
from gcpo.files import why
from gcpo.tools.evaluate import EvaluationError, metrics
from gcpo.tools.evaluate.questions import TITLES, Question, QuestionSet, load_sets
from gcpo.tools.evaluate.results import RESULTS_FILE, read_results
from gcpo.tools.evaluate.samples import SETTINGS_FILE, read_json

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample

FOLDER = "inspect"
"""Folder of the logs in the output of an evaluation."""
RIGHT = "acc"
"""The score that says whether a sample is right."""


def export(name: str, output: Path, sets: Sequence[str] = ()) -> list[Path]:
    """Write ``inspect/SET.eval`` for the sets of an evaluation, with the samples that its results count.

    Args:
        name: name of the model in the logs.
        output: output of the evaluation.
        sets: sets by name or file, see `load_sets`; empty: all sets of the results, which must be named ones.

    Returns:
        The written files.

    Raises:
        EvaluationError: inspect_ai is not installed, the evaluation is not finished, its files cannot be read, a set
            is not the evaluated one, or a log cannot be written.
    """
    try:
        from inspect_ai.log import write_eval_log
    except ImportError as error:
        raise EvaluationError(
            f"inspect_ai writes the logs: run `pip install 'gcpo[inspect]'` first ({error})"
        ) from error
    results, settings = read_results(output).questions, read_json(output / SETTINGS_FILE)
    if files := [known for known in results if not sets and known not in TITLES]:
        raise EvaluationError(
            f"the set {files[0]} of {output} was a file; name the sets with --sets, as in its evaluation"
        )
    written = []
    for found in load_sets(sets or list(results)):
        if found.name not in results:
            raise EvaluationError(f"{output} has no results of the set {found.name}; it has {', '.join(results)}")
        if settings["sets"].get(found.name) != found.sha256:
            raise EvaluationError(f"{found.path} is another file than the one that {output} was evaluated on")
        log = make_log(name, output, found, results[found.name], settings)
        target = output / FOLDER / f"{found.name}.eval"
        part = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(exist_ok=True)
            write_eval_log(log, str(part), format="eval")
            os.replace(part, target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise EvaluationError(f"{target} cannot be written: {why(error)}") from error
        written.append(target)
    return written


def make_log(
    name: str, output: Path, found: QuestionSet, results: Sequence[metrics.Question], settings: dict[str, Any]
) -> EvalLog:
    """Return the log of a set: a sample per question and epoch, which is the number of the sample, from 1 on.

    Args:
        name: name of the model.
        output: output of the evaluation.
        found: the questions.
        results: results of the questions; they limit the questions and samples of the log.
        settings: settings of the evaluation.

    Raises:
        EvaluationError: the file of the samples cannot be read.
    """
    from inspect_ai import log as inspect
    from inspect_ai.model import GenerateConfig

    counts = {result.id: result.samples for result in results}
    questions = {question.id: question for question in found.questions if question.id in counts}
    try:
        lines = map(json.loads, (output / f"{found.name}.jsonl").read_bytes().splitlines())
        lines = [line for line in lines if line["sample"] < counts.get(line["question"], 0)]
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"the samples of {found.name} in {output} cannot be read: {error!r}") from error
    lines.sort(key=lambda line: (line["row"], line["sample"]))
    samples = [_sample(name, questions[line["question"]], line) for line in lines]
    epochs = max(counts.values())
    return inspect.EvalLog(
        status="success",
        eval=inspect.EvalSpec(
            created=datetime.fromtimestamp((output / RESULTS_FILE).stat().st_mtime, UTC).isoformat(),
            task=found.name,
            model=name,
            model_generate_config=GenerateConfig(
                **{key: settings[key] for key in ("temperature", "top_p", "max_tokens", "seed")}
            ),
            dataset=inspect.EvalDataset(
                name=found.name, location=str(found.path), samples=len(questions), sample_ids=list(questions)
            ),
            config=inspect.EvalConfig(epochs=epochs, epochs_reducer=["mean"]),
            packages={"gcpo": gcpo.__version__, "inspect_ai": importlib.metadata.version("inspect_ai")},
            metadata={"weights": settings["model"], "set_sha256": found.sha256},
        ),
        results=inspect.EvalResults(
            total_samples=len(questions) * epochs, completed_samples=len(samples), scores=_scores(samples, results)
        ),
        samples=samples,
    )


def _sample(name: str, question: Question, line: dict[str, Any]) -> EvalSample:
    from inspect_ai import log as inspect
    from inspect_ai.model import ModelOutput, ModelUsage
    from inspect_ai.scorer import CORRECT, INCORRECT, Score

    cut = line["finish_reason"] == "length"
    output = ModelOutput.from_content(name, line["text"], "max_tokens" if cut else "stop")
    output.usage = ModelUsage(output_tokens=line["tokens"], total_tokens=line["tokens"])
    right = line["scores"].get(RIGHT, line["scores"]["score"]) == 1
    explanation = "no answer in the response" if question.has_answer and line["answer"] is None else None
    accuracy = Score(
        value=CORRECT if right else INCORRECT,
        answer=line["answer"],
        explanation="cut at the token limit" if cut else explanation,
    )
    others = {key: Score(value=value) for key, value in line["scores"].items() if key != RIGHT}
    truth = question.ground_truth
    messages: list[Any] = [{key: message[key] for key in ("role", "content")} for message in question.prompt]
    return inspect.EvalSample(
        id=question.id,
        epoch=line["sample"] + 1,
        input=messages,
        target=list(map(str, truth)) if isinstance(truth, list) else str(truth),
        messages=[*messages, output.message],
        output=output,
        scores={RIGHT: accuracy, **others},
        metadata={"row": line["row"], "seed": line["seed"], "data_source": question.data_source},
    )


def _scores(samples: Sequence[EvalSample], results: Sequence[metrics.Question]) -> list[Any]:
    """Return the metrics of the header: those of the evaluation for `RIGHT`, and the mean of every other score."""
    from inspect_ai.log import EvalMetric, EvalScore

    summary = metrics.summarize(results)
    value = summary.pass_at_1
    found = {"pass@1": value.mean, "pass@1_low": value.low, "pass@1_high": value.high}
    found |= {f"pass@{k}": mean for k, mean in summary.pass_at.items() if k > 1}
    found |= {"maj": summary.majority, "truncated": summary.truncated, "tokens": summary.tokens}
    by_score: dict[str, dict[str, float | None]] = {RIGHT: found}
    values = [{name: score.value for name, score in (sample.scores or {}).items()} for sample in samples]
    for name in dict.fromkeys(name for one in values for name in one if name != RIGHT):
        by_score[name] = {"mean": fmean(one[name] for one in values if name in one)}  # pyright: ignore[reportArgumentType]
    return [
        EvalScore(
            name=name,
            scorer=name,
            reducer="mean",
            metrics={key: EvalMetric(name=key, value=number) for key, number in own.items() if number is not None},
        )
        for name, own in by_score.items()
    ]
