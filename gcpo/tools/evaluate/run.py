"""One evaluation: sample what is missing, grade it, write it down, and sum it up."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcpo.seeding import request_seed
from gcpo.tools.display import Display
from gcpo.tools.evaluate import EvaluationError, metrics
from gcpo.tools.evaluate.models import Model
from gcpo.tools.evaluate.questions import Question, QuestionSet
from gcpo.tools.evaluate.results import Results, write_results
from gcpo.tools.evaluate.samples import LOG_FILE, SETTINGS_FILE, SampleFile, alone_in, check_settings, write_json
from gcpo.tools.evaluate.sampling import Completion, Prompts, Request, Sampler

if TYPE_CHECKING:
    from gcpo.tools.evaluate.aggregate import Aggregation


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


@dataclass(frozen=True)
class Work:
    """The samples that one file shall hold.

    Attributes:
        set: their questions.
        file: the file and the samples that it holds.
        each: wanted number of samples of every question.
        request: makes the request for a sample of a question.
    """

    set: QuestionSet
    file: SampleFile
    each: int
    request: Callable[[Question, int], Request]

    @property
    def wanted(self) -> list[tuple[Question, int]]:
        """Question and index of every wanted sample, by question, since the samples of one share its prompt."""
        return [(question, index) for question in self.set.questions for index in range(self.each)]

    @property
    def missing(self) -> list[tuple[Question, int]]:
        """Question and index of every wanted sample that the file lacks."""
        return [(question, index) for question, index in self.wanted if (question.id, index) not in self.file.samples]

    def samples(self, question: Question) -> list[metrics.Sample]:
        """Return the wanted samples of a question; the file must hold all of them."""
        return [self.file.samples[question.id, index] for index in range(self.each)]


def evaluate(
    model: Model,
    sets: Sequence[QuestionSet],
    prompts: Prompts,
    settings: Settings,
    output: Path,
    start: Callable[[Path], Sampler],
    sandbox: Mapping[str, Any] | None = None,
    aggregation: Aggregation | None = None,
) -> Results:
    """Sample and grade what ``output`` doesn't hold yet, and write ``results.json``.

    Args:
        model: what is evaluated.
        sets: on what.
        prompts: of all their questions.
        settings: how.
        output: folder of the samples, made if need be.
        start: makes the sampler, told where its log goes; called only if a sample is missing.
        sandbox: for sets of programs, `sandbox` and `sandbox_fusion_url` of `gcpo.rewards.code`.
        aggregation: settings of the aggregated answers; ``None``: there are none.

    Returns:
        The results of ``sets``, from the first ``settings.samples`` samples of every question.

    Raises:
        EvaluationError: ``output`` holds other samples, or can't be written, or the samples can't be graded here, for
            example since no sandbox for programs works.
    """
    sandbox = dict(sandbox or {})
    _check_sandbox(sets, sandbox)
    own = {"model": model.digest or model.path, **dataclasses.asdict(settings)}
    del own["samples"]  # a sample does not depend on how many there are
    own["sets"] = {found.name: found.sha256 for found in sets}
    own["aggregate"] = {str(aggregation.size): aggregation.blocks.to_dict()} if aggregation else {}
    with alone_in(output):
        recorded = check_settings(output, own)
        plain = [_plain_work(found, output, prompts, settings) for found in sets]
        answers = [_answer_work(work, output, aggregation) for work in plain] if aggregation else []
        works = [*plain, *answers]
        count, wanted = sum(len(work.missing) for work in works), sum(len(work.wanted) for work in works)
        if count:
            there = f"{wanted - count:,} of {wanted:,} samples are there; " if count < wanted else ""
            print(f"{there}starting vLLM for {count:,}", flush=True)
            sampler = start(output / LOG_FILE)
            write_json(output / SETTINGS_FILE, recorded)
            for work in works:
                _sample(work, sampler, sandbox)
        else:
            print("every sample is there: nothing to generate")
        found = {work.set.name: _questions(work) for work in plain}
        size = aggregation.size if aggregation else 0
        pairs = zip(plain, answers, strict=bool(answers))
        results = Results(found, {work.set.name: {size: _aggregates(work, other, size)} for work, other in pairs})
        write_results(output, results)
    return results


def _plain_work(found: QuestionSet, output: Path, prompts: Prompts, settings: Settings) -> Work:
    """Return the samples of a set."""

    def request(question: Question, index: int) -> Request:
        return Request(
            key=f"{question.id}:{index}",
            prompt_ids=prompts.ids[question.id],
            seed=sample_seed(settings.seed, question.id, index),
            max_tokens=prompts.room(question.id, settings.max_tokens),
        )

    return Work(found, SampleFile(output / f"{found.name}.jsonl"), settings.samples, request)


def _answer_work(plain: Work, output: Path, aggregation: Aggregation) -> Work:
    """Return the aggregated answers to the samples of a set."""
    file = SampleFile(output / f"{plain.set.name}.aggregate-{aggregation.size}.jsonl")
    return Work(plain.set, file, plain.each // aggregation.size, aggregation.requester(plain.file))


def _sample(work: Work, sampler: Sampler, sandbox: Mapping[str, Any]) -> None:
    """Sample and grade what is missing."""
    missing = work.missing
    if not missing:
        return
    requests = [(question, work.request(question, index)) for question, index in missing]
    requested = {request.key: (question, request) for question, request in requests}
    known = [sample for question, index in work.wanted if (sample := work.file.samples.get((question.id, index)))]
    progress = Progress(work.file.path.stem, len(work.wanted), known)
    try:
        for completions in sampler([request for _, request in requested.values()]):
            asked = [requested[completion.key] for completion in completions]
            scores = _grade([question for question, _ in asked], completions, sandbox)
            parts = zip(asked, completions, scores, strict=True)
            progress.update(
                work.file.append(
                    _line(question, made, request.seed, score) for (question, request), made, score in parts
                )
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
        "tokens": len(completion.token_ids),
        "token_ids": completion.token_ids,
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


def _questions(work: Work) -> list[metrics.Question]:
    from gcpo.rewards import same_answer

    return [
        metrics.of_question(question.id, work.samples(question), same_answer if question.has_answer else None)
        for question in work.set.questions
    ]


def _aggregates(plain: Work, answers: Work, size: int) -> list[metrics.Aggregate]:
    from gcpo.rewards import same_answer

    def of(question: Question) -> metrics.Aggregate:
        samples = plain.samples(question)
        groups = [samples[group * size : (group + 1) * size] for group in range(answers.each)]
        same = same_answer if question.has_answer else None
        return metrics.aggregate_of(question.id, groups, answers.samples(question), same)

    return list(map(of, plain.set.questions))


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
