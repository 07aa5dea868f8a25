"""The phases with a stand-in for vLLM; the questions, the reward and the value model are real."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from examples.arithmetic.task import prepare
from examples.arithmetic.warm_start import Recipe, make_model, make_tokenizer
from gcpo.faults import RunStoppedError
from gcpo.selftraining.search import Proposal, Request
from gcpo.selftraining.settings import SelfTrainingSettings
from gcpo.selftraining.value_model import ValueModel
from gcpo.settings import ConfigError
from recipe.rest_mcts.loop import Place
from recipe.rest_mcts.phases import LABELS_FILE, SFT_FILE, Phases


class FixedPolicy:
    """Answers with a box that is right for every second question, in two steps of two tokens each."""

    def __init__(self, phases: Phases, solves: bool = True) -> None:
        self.phases, self.solves, self.tokens = phases, solves, 0
        self.asked: list[Request] = []

    def propose(self, prompts: Sequence[Sequence[int]], requests: Sequence[Request]) -> list[Proposal]:
        self.asked += requests
        self.tokens += 2 * len(requests)
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Proposal:
        truth = int(self.phases.train.questions[request.question].ground_truth)
        box = f"\\boxed{{{truth if self.solves and request.question % 2 else truth + 1}}}"
        if request.prefix or request.whole:
            return Proposal((5, 0), box, True)
        return Proposal((3, 4), "step ", False)

    def split(self, tokens: Sequence[int]) -> list[int]:
        return list(range(2, len(tokens) + 1, 2))

    def decode(self, tokens: Sequence[int]) -> str:
        return "step " if tokens else ""


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    prepare(tmp_path / "data", train_size=6, test_size=3)

    def make(solves: bool = True, **given: Any) -> tuple[Phases, FixedPolicy, Place]:
        fixed = {
            "model": str(tiny_model),
            "train_file": str(tmp_path / "data" / "train.parquet"),
            "test_file": str(tmp_path / "data" / "test.parquet"),
            "max_response_tokens": 8,
            "questions_together": 4,
            "search": {"iterations": 4, "branch": 1, "end_gate": 1.5},
            "filter": {"min_value": 0.0, "min_characters": 0},
            "first_value": {"questions": 6, "samples": 1, "rollouts": 1},
        }
        settings = SelfTrainingSettings.parse(fixed | given, "self_training")
        phases = Phases(settings)
        policy = FixedPolicy(phases, solves)
        monkeypatch.setattr(phases, "_policy", lambda _: policy)
        places = [Place(settings, tmp_path / "run", iteration) for iteration in (0, 1)]
        for place in places:
            place.folder.mkdir(parents=True, exist_ok=True)
        return phases, policy, places[1]

    return make


def test_the_questions_of_an_iteration(make: Any) -> None:
    """Other ones in each iteration, all before any comes twice; iteration 0 shares those of iteration 1."""
    phases, _, _ = make()
    assert sorted(phases._questions(1, 3) + phases._questions(2, 3)) == list(range(6))
    assert phases._questions(3, 3) == phases._questions(1, 3) == phases._questions(0, 3)
    assert sorted(phases._questions(1, None)) == sorted(phases._questions(1, 99)) == list(range(6))
    assert phases._questions(1, 6) != list(range(6))


def test_search_and_training_data(make: Any) -> None:
    """Three of six questions are solved: the policy learns from three solutions, the value model from three trees."""
    phases, policy, place = make()
    phases.first_labels(place.previous)
    assert phases.value(place.previous).keys() == {"rest_mcts/value/loss", "rest_mcts/value/first_loss"}
    metrics = phases.search(place)
    assert metrics["rest_mcts/samples/policy"] == 3 and metrics["rest_mcts/dropped/wrong"] == 3
    assert metrics["rest_mcts/search/acc"] == metrics["rest_mcts/search/solved_frac"] == 0.5
    assert metrics["rest_mcts/samples/value"] == 6 and metrics["tokens/generated"] > 0
    rows = pq.read_table(place.folder / SFT_FILE).to_pylist()
    assert all(row["response_ids"] == [3, 4, 5, 0] and row["response"].startswith("step \\boxed{") for row in rows)
    assert {tuple(row["prompt_ids"]) for row in rows} == {tuple(phases.train.prompts[index]) for index in (1, 3, 5)}
    labels = [json.loads(line) for line in (place.folder / LABELS_FILE).read_text().splitlines()]
    assert sorted({(tuple(label["tokens"]), label["value"]) for label in labels}) == [
        ((3, 4), 0.5),
        ((3, 4, 5, 0), 1.0),
    ]


def test_a_search_goes_on_after_the_last_group(make: Any) -> None:
    """The group that an earlier start has finished is read and not searched again."""
    phases, policy, place = make()
    ValueModel.load(phases.settings.model, 900).save(place.previous.value)
    first = phases.search(place)
    searched = len(policy.asked)
    parts = sorted((place.folder / "search").iterdir())
    assert [part.name for part in parts] == ["000000.json", "000004.json"]
    parts[1].unlink()
    policy.asked.clear()
    assert phases.search(place) == first
    assert {request.question for request in policy.asked} == set(phases._questions(1, None)[4:])
    assert 0 < len(policy.asked) < searched


def test_nothing_to_train_on(make: Any) -> None:
    """A search and a sampling without a right solution stop the run; so does a filter that keeps nothing."""
    phases, _, place = make(solves=False)
    ValueModel.load(phases.settings.model, 900).save(place.previous.value)
    with pytest.raises(RunStoppedError, match="no right solution to any of 6 questions"):
        phases.search(place)
    with pytest.raises(RunStoppedError, match=r"no solution is left to train on \(dropped: wrong 48, same 0"):
        phases.sample(place)
    phases, _, place = make(filter={"min_characters": 50})
    with pytest.raises(RunStoppedError, match=r"short 24\)"):
        phases.sample(place)


def test_the_value_model_goes_on_from_the_iteration_before(make: Any) -> None:
    phases, _, place = make(value={"learning_rate": 1e-12})
    model = ValueModel.load(phases.settings.model, 900, seed=5)
    model.save(place.previous.value)
    (place.folder / LABELS_FILE).write_text('{"question": 0, "tokens": [3], "value": 0.5}\n')
    phases.value(place)
    assert torch.allclose(ValueModel.load(place.value, 900).head.weight, model.head.weight, atol=1e-6)


def test_the_value_model_reads_the_tokens_of_the_policy(make: Any, tiny_model: Path, tmp_path: Path) -> None:
    """A model with another tokenizer is refused."""
    make(value={"model": str(tiny_model)})
    recipe = Recipe(vocab_size=300, hidden_size=32, intermediate_size=48, layers=1, heads=2)
    tokenizer = make_tokenizer(recipe)
    make_model(recipe, tokenizer).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="value.model is .*other', whose tokenizer is not that of the policy"):
        make(value={"model": str(tmp_path / "other")})


def test_evaluation(make: Any) -> None:
    """Greedy, one answer to each held-out question; the stand-in's answers belong to other questions."""
    phases, policy, place = make()
    policy.phases = type("Held", (), {"train": phases.tests["val-core"]})()  # type: ignore[assignment]
    assert phases.evaluate(place) == {"val-core/gcpo/arithmetic/acc/mean@1": pytest.approx(1 / 3)}
    assert [(one.question, one.temperature, one.whole) for one in policy.asked] == [(i, 0.0, True) for i in range(3)]
