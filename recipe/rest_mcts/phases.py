"""The phases of an iteration on the real stack: vLLM, the reward of training, verl's SFT trainer, the value model."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from gcpo.faults import RunStoppedError
from gcpo.files import write_atomically
from gcpo.seeding import request_seed
from gcpo.selftraining import samples
from gcpo.selftraining.samples import Label, Solution
from gcpo.selftraining.search import Judged, Request, Result, TreeSearch, search_together
from gcpo.selftraining.settings import SearchSettings, SelfTrainingSettings
from gcpo.selftraining.value_model import ValueModel, regress
from gcpo.settings import ConfigError
from gcpo.tools.evaluate.models import find_model
from gcpo.tools.evaluate.questions import Question, load_sets
from gcpo.tools.evaluate.sampling import make_prompts
from recipe.rest_mcts.loop import Phase, Place
from recipe.rest_mcts.policy import Policy
from recipe.rest_mcts.sft import command, fine_tune

LABELS_FILE = "labels.jsonl"
SFT_FILE = "sft.parquet"


class Set:
    """The questions of a file, with the token ids of their prompts."""

    def __init__(self, path: str, model: str) -> None:
        (found,) = load_sets([path])
        self.questions: list[Question] = found.questions
        ids = make_prompts(find_model(model), [found]).ids
        self.prompts = [ids[question.id] for question in self.questions]

    def grade(self, texts: Sequence[tuple[int, str]]) -> list[bool]:
        """Whether responses are right; each is given with the index of its question."""
        from gcpo.rewards import grade_many

        asked = [self.questions[index] for index, _ in texts]
        scores = grade_many(
            [text for _, text in texts],
            [question.ground_truth for question in asked],
            [question.data_source for question in asked],
            [question.extra_info for question in asked],
        )
        return [score.get("acc", score["score"]) == 1 for score in scores]

    def named(self, indices: Iterable[int]) -> list[tuple[int, str]]:
        """Indices with the names that the seeds follow from."""
        return [(index, self.questions[index].id) for index in indices]


class Phases:
    """All phases; the engine of a policy stays loaded until another policy is needed."""

    def __init__(self, settings: SelfTrainingSettings) -> None:
        """
        Raises:
            EvaluationError: a file or the model cannot be loaded.
            ConfigError: the value model has another tokenizer.
        """
        self.settings = settings
        if settings.value.model and _vocabulary(settings.value.model) != _vocabulary(settings.model):
            raise ConfigError(
                f"self_training.value.model is {settings.value.model!r}, whose tokenizer is not that of the policy; "
                "take a model of the policy's family"
            )
        self.train = Set(settings.train_file, settings.model)
        self.tests = {"val-core": Set(settings.test_file, settings.model)}
        if settings.ood_file:
            self.tests["val-ood"] = Set(settings.ood_file, settings.model)
        self._loaded: tuple[str, Policy] | None = None

    def all(self) -> dict[str, Phase]:
        """By name."""
        names = ("first_labels", "search", "sample", "sft", "value", "evaluate")
        return {name: getattr(self, name) for name in names}

    def close(self) -> None:
        """End the processes of the engine, and leave the memory of a GPU to others."""
        if self._loaded:
            self._loaded[1].close()
            self._loaded = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # ---- making data -------------------------------------------------------------------------------------------------

    def first_labels(self, place: Place) -> dict[str, float]:
        """Labels of the first value model, from samples and rollouts of the policy."""
        policy, settings = self._policy(place), self.settings.first_value
        before = policy.tokens
        chosen = self._questions(0, settings.questions)
        labels = samples.first_labels(
            self.train.named(chosen),
            settings,
            self.settings.seed,
            propose=functools.partial(policy.propose, self.train.prompts),
            grade=self.train.grade,
            split=policy.split,
            decode=policy.decode,
        )
        _write_labels(place, labels)
        return {"rest_mcts/samples/value": len(labels), "tokens/generated": policy.tokens - before}

    def search(self, place: Place) -> dict[str, float]:
        """Search trees of the iteration's questions; a group of questions that is done is not searched again."""
        chosen = self._questions(place.iteration, self.settings.questions)
        size = self.settings.questions_together
        folder = place.folder / "search"
        folder.mkdir(exist_ok=True)
        parts = []
        for start in range(0, len(chosen), size):
            path = folder / f"{start:06d}.json"
            if not path.is_file():
                write_atomically(path, json.dumps(self._search_part(place, chosen[start : start + size])))
                print(f"{min(start + size, len(chosen))} of {len(chosen)} questions searched", flush=True)
            parts.append(json.loads(path.read_text()))
        labels = [Label(question, tuple(tokens), value) for part in parts for question, tokens, value in part["labels"]]
        if not labels:
            raise RunStoppedError(f"the search found no right solution to any of {len(chosen)} questions")
        _write_labels(place, labels)
        metrics = self._write_solutions(place, [_solution(one) for part in parts for one in part["solutions"]])
        return metrics | {
            "rest_mcts/samples/value": len(labels),
            "rest_mcts/search/acc": fmean(right for part in parts for right in part["right"]),
            "rest_mcts/search/solved_frac": fmean(solved for part in parts for solved in part["solved"]),
            "tokens/generated": sum(part["tokens"] for part in parts),
        }

    def _search_part(self, place: Place, chosen: Sequence[int]) -> dict[str, Any]:
        policy = self._policy(place.previous)
        before = policy.tokens
        results = self._run_search(place.previous, self.train, chosen, self.settings.search)
        solutions = [samples.solutions_of(result, index) for index, result in zip(chosen, results, strict=True)]
        labels = [
            label
            for index, result in zip(chosen, results, strict=True)
            for label in samples.labels_of(result, index, self.settings.labels)
        ]
        return {
            "solutions": [asdict(solution) for found in solutions for solution in found],
            "labels": [[label.question, label.tokens, label.value] for label in labels],
            "right": [bool(result.answer.right) for result in results],
            "solved": [any(solution.right for solution in found) for found in solutions],
            "tokens": policy.tokens - before,
        }

    def _run_search(
        self, place: Place, questions: Set, chosen: Sequence[int], settings: SearchSettings
    ) -> list[Result]:
        """Search with the policy and the value model of ``place``, and grade."""
        policy = self._policy(place)
        model = ValueModel.load(place.value, self.settings.value.max_tokens)
        searches = [
            TreeSearch(
                index,
                key,
                settings,
                self.settings.steps,
                self.settings.max_response_tokens,
                self._seed(place, "search"),
            )
            for index, key in questions.named(chosen)
        ]

        def value(partial: Sequence[Judged]) -> list[float]:
            return model.judge([(questions.prompts[one.question], one.tokens) for one in partial])

        results = search_together(searches, functools.partial(policy.propose, questions.prompts), value)
        samples.grade_results(results, chosen, questions.grade)
        return results

    def sample(self, place: Place) -> dict[str, float]:
        """Plain samples of the iteration's questions."""
        policy = self._policy(place.previous)
        before = policy.tokens
        found = samples.sample_solutions(
            self.train.named(self._questions(place.iteration, self.settings.questions)),
            self.settings.sampling.n,
            self.settings.sampling.temperature,
            (self._seed(place, "sample"),),
            functools.partial(policy.propose, self.train.prompts),
            self.train.grade,
        )
        metrics = self._write_solutions(place, found)
        return metrics | {
            "critic/score/mean": fmean(one.right for one in found),
            "tokens/generated": policy.tokens - before,
        }

    # ---- training ----------------------------------------------------------------------------------------------------

    def sft(self, place: Place) -> dict[str, float]:
        """Fine-tune the policy on the solutions that were chosen."""
        import pyarrow.parquet as pq

        self.close()  # the trainer needs the memory
        start = place.previous.policy if self.settings.sft.start == "previous" else self.settings.model
        path = place.folder / SFT_FILE
        rows = pq.read_table(path, columns=["prompt_ids", "response_ids"]).to_pylist()
        longest = max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)
        folder = (place.folder / "sft").resolve()
        arguments = command(self.settings, find_model(start).path, path.resolve(), folder, len(rows), longest)
        return {"rest_mcts/sft/loss": fine_tune(arguments, folder, Path(place.policy))}

    def value(self, place: Place) -> dict[str, float]:
        """Fit the value model to the labels of the iteration; it starts from that of the iteration before."""
        if torch.cuda.is_available():
            self.close()
        labels = [json.loads(line) for line in (place.folder / LABELS_FILE).read_text().splitlines()]
        settings = self.settings.value
        first = find_model(settings.model or self.settings.model).path
        start = place.previous.value if place.iteration else first
        model = ValueModel.load(start, settings.max_tokens, seed=self.settings.seed)
        inputs = [(self.train.prompts[label["question"]], label["tokens"]) for label in labels]
        targets = [float(label["value"]) for label in labels]
        losses = regress(model, inputs, targets, settings, self._seed(place, "value"))
        place.value.mkdir(exist_ok=True)
        model.save(place.value)
        return {"rest_mcts/value/loss": losses[-1], "rest_mcts/value/first_loss": losses[0]}

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, place: Place) -> dict[str, float]:
        """Greedy accuracy of the policy on the held-out questions, and that of the test-time search."""
        policy = self._policy(place)
        metrics: dict[str, float] = {}
        greedy: list[bool] = []
        for split, questions in self.tests.items():
            requests = [Request(index, (), 0, 0.0, whole=True) for index in range(len(questions.questions))]
            answers = policy.propose(questions.prompts, requests)
            rights = questions.grade(
                [(request.question, one.text) for request, one in zip(requests, answers, strict=True)]
            )
            by_source: dict[str, list[bool]] = {}
            for question, right in zip(questions.questions, rights, strict=True):
                by_source.setdefault(question.data_source, []).append(right)
            names = {source: f"{split}/{source}" if split == "val-core" else split for source in by_source}
            metrics |= {f"{names[source]}/acc/mean@1": fmean(found) for source, found in by_source.items()}
            if split == "val-core":
                greedy = rights
        count = min(self.settings.evaluation.search_questions, len(greedy))
        if self.settings.method == "rest_mcts" and count:
            before = policy.tokens
            results = self._run_search(place, self.tests["val-core"], range(count), self.settings.test_search)
            metrics["rest_mcts/test_search/acc"] = fmean(bool(result.answer.right) for result in results)
            metrics["rest_mcts/test_search/greedy_acc"] = fmean(greedy[:count])
            metrics["rest_mcts/test_search/tokens"] = (policy.tokens - before) / count
        return metrics

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _policy(self, place: Place) -> Policy:
        """The engine with the policy after an iteration."""
        if self._loaded and self._loaded[0] == place.policy:
            return self._loaded[1]
        self.close()
        longest = max(len(ids) for one in (self.train, *self.tests.values()) for ids in one.prompts)
        policy = Policy(self.settings, find_model(place.policy), longest, place.output / "vllm.log")
        self._loaded = (place.policy, policy)
        return policy

    def _questions(self, iteration: int, count: int | None) -> list[int]:
        """Questions of an iteration: the next ones of one random order, from the front again at its end."""
        order = list(range(len(self.train.questions)))
        random.Random(request_seed(self.settings.seed, "order")).shuffle(order)
        count = min(count or len(order), len(order))
        start = max(iteration - 1, 0) * count
        return [order[at % len(order)] for at in range(start, start + count)]

    def _seed(self, place: Place, purpose: str) -> int:
        return request_seed(self.settings.seed, purpose, place.iteration)

    def _write_solutions(self, place: Place, solutions: Sequence[Solution]) -> dict[str, float]:
        """Write the data of the fine-tuning.

        Raises:
            RunStoppedError: nothing is left to train on.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        chosen, dropped = samples.choose_solutions(solutions, self.settings.filter)
        counts: dict[str, float] = {f"rest_mcts/dropped/{reason}": count for reason, count in dropped.items()}
        if len(chosen) < self.settings.gpus:
            reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
            raise RunStoppedError(f"no solution is left to train on (dropped: {reasons})")
        rows = [
            {
                "prompt_ids": self.train.prompts[one.question],
                "response_ids": list(one.tokens),
                "question": self.train.questions[one.question].prompt[-1]["content"],
                "response": one.text,
                "value": one.value,
            }
            for one in chosen
        ]
        pq.write_table(pa.Table.from_pylist(rows), place.folder / SFT_FILE)
        return {"rest_mcts/samples/policy": len(chosen), **counts}


def _vocabulary(model: str) -> dict[str, int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(find_model(model).path).get_vocab()


def _solution(found: dict[str, Any]) -> Solution:
    return Solution(**{**found, "tokens": tuple(found["tokens"])})


def _write_labels(place: Place, labels: Sequence[Label]) -> None:
    """Write the labels.

    Raises:
        RunStoppedError: there are none.
    """
    if not labels:
        raise RunStoppedError("there are no labels for the value model")
    write_atomically(place.folder / LABELS_FILE, "".join(json.dumps(asdict(label)) + "\n" for label in labels))
