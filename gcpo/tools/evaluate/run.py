"""One evaluation: sample what is missing, grade it, write it down, and sum it up."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcpo.seeding import request_seed
from gcpo.tools.display import Display
from gcpo.tools.evaluate import EvaluationError, metrics
from gcpo.tools.evaluate.models import Model
from gcpo.tools.evaluate.questions import Question, QuestionSet
from gcpo.tools.evaluate.samples import (
    LOG_FILE,
    SETTINGS_FILE,
    SampleFile,
    alone_in,
    check_settings,
    read_json,
    write_json,
)
from gcpo.tools.evaluate.sampling import Completion, Prompts, Request, Sampler

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Settings:
    """What is sampled.

    Attributes:
        samples: k, samples of every question.
        temperature: 0 is greedy.
        top_p: smallest set of tokens with this probability.
        max_tokens: longest response.
        seed: with the question and the sample's index it makes the sample's seed.
    """

    samples: int = 16
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 16384
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("samples", self.samples >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max-tokens", self.max_tokens >= 1, "1 or more"),
        ):
            if not fits:
                value = getattr(self, name.replace("-", "_"))
                raise EvaluationError(f"--{name} is {value}; it must be {wanted}")
        if self.temperature == 0 and self.samples > 1:
            raise EvaluationError(
                f"--temperature 0 is greedy, so the {self.samples} samples of a question would be the same; "
                "set --samples 1"
            )


def sample_seed(seed: int, question: str, index: int) -> int:
    """The seed of a sample; it depends on the question and not on where it stands or on what else is sampled."""
    return request_seed(seed, "evaluation", question, index)


def evaluate(
    model: Model,
    sets: Sequence[QuestionSet],
    prompts: Prompts,
    settings: Settings,
    output: Path,
    start: Callable[[Path], Sampler],
    sandbox: Mapping[str, Any] | None = None,
) -> dict[str, list[metrics.Question]]:
    """Sample and grade what ``output`` doesn't hold yet, and write ``results.json``.

    Args:
        model: what is evaluated.
        sets: on what.
        prompts: of all their questions.
        settings: how.
        output: folder of the samples, made if need be.
        start: makes the sampler, told where its log goes; called only if a sample is missing.
        sandbox: for sets of programs, `sandbox` and `sandbox_fusion_url` of `gcpo.rewards.code`.

    Returns:
        By set, what was found for every question, from its first ``settings.samples`` samples.

    Raises:
        EvaluationError: ``output`` holds other samples, or can't be written, or the samples can't be graded here, for
            example since no sandbox for programs works.
    """
    sandbox = dict(sandbox or {})
    _check_sandbox(sets, sandbox)
    own = {"model": model.digest or model.path, **dataclasses.asdict(settings)}
    del own["samples"]  # a sample does not depend on how many there are
    with alone_in(output):
        recorded = check_settings(output, {**own, "sets": {found.name: found.sha256 for found in sets}})
        files = {found.name: SampleFile(output / f"{found.name}.jsonl") for found in sets}
        missing = {found.name: list(_missing(found, files[found.name], prompts, settings)) for found in sets}
        count, wanted = sum(map(len, missing.values())), sum(len(found.questions) for found in sets) * settings.samples
        if count:
            there = f"{wanted - count:,} of {wanted:,} samples are there; " if count < wanted else ""
            print(f"{there}starting vLLM for {count:,}", flush=True)
            sampler = start(output / LOG_FILE)
            write_json(output / SETTINGS_FILE, recorded)
            for found in sets:
                _sample_set(found, files[found.name], missing[found.name], settings, sampler, sandbox)
        else:
            print("every sample is there: nothing to generate")
        results = {found.name: _sum_up(found, files[found.name], settings.samples) for found in sets}
        _write_results(output, results)
    return results


def _missing(found: QuestionSet, file: SampleFile, prompts: Prompts, settings: Settings) -> Iterator[Request]:
    """All samples of a question stand together, since they share its prompt."""
    for question in found.questions:
        for index in range(settings.samples):
            if (question.id, index) not in file.samples:
                yield Request(
                    key=f"{question.id}:{index}",
                    prompt_ids=prompts.ids[question.id],
                    seed=sample_seed(settings.seed, question.id, index),
                    max_tokens=prompts.room(question.id, settings.max_tokens),
                )


def _sample_set(
    found: QuestionSet,
    file: SampleFile,
    requests: Sequence[Request],
    settings: Settings,
    sampler: Sampler,
    sandbox: Mapping[str, Any],
) -> None:
    if not requests:
        return
    questions = {question.id: question for question in found.questions}
    requested = {request.key: request for request in requests}
    wanted = [(question.id, index) for question in found.questions for index in range(settings.samples)]
    progress = Progress(found.name, len(wanted), [file.samples[key] for key in wanted if key in file.samples])
    try:
        for completions in sampler(requests):
            asked = [questions[completion.key.rpartition(":")[0]] for completion in completions]
            scores = _grade(asked, completions, sandbox)
            parts = zip(asked, completions, scores, strict=True)
            progress.update(
                file.append(_line(one, made, requested[made.key].seed, score) for one, made, score in parts)
            )
    finally:
        progress.display.close()


def _line(question: Question, completion: Completion, seed: int, scores: Mapping[str, Any]) -> dict[str, Any]:
    from gcpo.rewards import extracted_answer

    answer = extracted_answer(question.data_source, completion.text, question.ground_truth)
    return {
        "question": question.id,
        "row": question.row,
        "sample": int(completion.key.rpartition(":")[2]),
        "seed": seed,
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "answer": answer if question.has_answer else None,
        "scores": dict(scores),
    }


def _check_sandbox(sets: Sequence[QuestionSet], sandbox: Mapping[str, Any]) -> None:
    """Before anything is generated: programs can be graded, if there are any."""
    from gcpo.rewards import grader_of
    from gcpo.rewards.sandbox import SandboxError, check

    questions = [question for found in sets for question in found.questions]
    try:
        if any(grader_of(question.data_source, question.ground_truth) == "code" for question in questions):
            print(f"programs run in the sandbox {check(**sandbox)}", flush=True)
    except (SandboxError, ValueError) as error:
        raise EvaluationError(str(error)) from error


def _grade(
    questions: Sequence[Question], completions: Sequence[Completion], sandbox: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The scores of the reward function of training."""
    from gcpo.rewards import GraderError, grade_many

    try:
        return grade_many(
            [completion.text for completion in completions],
            [question.ground_truth for question in questions],
            [question.data_source for question in questions],
            [question.extra_info for question in questions],
            **sandbox,
        )
    except GraderError as error:
        raise EvaluationError(str(error)) from error


def _sum_up(found: QuestionSet, file: SampleFile, samples: int) -> list[metrics.Question]:
    from gcpo.rewards import same_answer

    def of(question: Question) -> metrics.Question:
        first = [file.samples[question.id, index] for index in range(samples)]
        return metrics.of_question(question.id, first, same_answer if question.has_answer else None)

    return list(map(of, found.questions))


# ---- results -------------------------------------------------------------------------------------------------------


def _write_results(output: Path, results: Mapping[str, Sequence[metrics.Question]]) -> None:
    """Sets that this call didn't ask for keep what an earlier one found."""
    path = output / RESULTS_FILE
    sets = read_json(path)["sets"] if path.is_file() else {}
    for name, questions in results.items():
        summary = dataclasses.asdict(metrics.summarize(questions))
        sets[name] = {"summary": summary, "questions": list(map(dataclasses.asdict, questions))}
    write_json(path, {"sets": sets})


def read_results(output: Path) -> dict[str, list[metrics.Question]]:
    """What an evaluation found, by set.

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
        return {name: [metrics.Question(**one) for one in found["questions"]] for name, found in sets.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"{path} is no results file: {error!r}") from error


class Progress:
    """A bar where there is a terminal, else a line every 10 % and every minute."""

    def __init__(self, name: str, total: int, known: Sequence[metrics.Sample]) -> None:
        """``known`` are the samples that are there already, of ``total``."""
        self.display = Display()
        self._name, self._total = name, total
        self._done, self._right, self._tokens = len(known), sum(sample.right for sample in known), 0
        self._started = self._shown_at = time.monotonic()
        self._shown = self._done

    def update(self, samples: Sequence[metrics.Sample]) -> None:
        """Count new samples, and show what is done."""
        self._done += len(samples)
        self._right += sum(sample.right for sample in samples)
        self._tokens += sum(sample.tokens for sample in samples)
        now = time.monotonic()
        text = (
            f"{self._name}  {self._done:,}/{self._total:,} samples  pass@1 {100 * self._right / self._done:.1f} %"
            f"  {self._tokens / (now - self._started):,.0f} tokens/s"
        )
        if self.display.is_live:
            self.display.refresh(text, completed=self._done, total=self._total)
        elif self._done == self._total or self._done - self._shown >= self._total / 10 or now - self._shown_at >= 60:
            self._shown, self._shown_at = self._done, now
            self.display.note(text)
