"""How the policy asks vLLM for steps; the engine is a stand-in that follows a fixed response."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gcpo.faults import RunStoppedError
from gcpo.selftraining.search import Proposal, Request
from gcpo.selftraining.settings import SelfTrainingSettings
from gcpo.tools.evaluate.models import Model
from recipe.rest_mcts import policy as module
from recipe.rest_mcts.policy import Policy

TEXT = "2+9=11 8+1+1=10 4+3+1=8 \\boxed{801}"
PROMPT = [1, 2]


class Engine:
    """Continues the prompt to ``TEXT`` and the end, and stops as vLLM does."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.response = [*tokenizer.encode(TEXT, add_special_tokens=False), tokenizer.eos_token_id]
        self.calls: list[list[Any]] = []
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.calls.append(["closed"])))

    def generate(self, texts: list[dict[str, list[int]]], params: list[Any], use_tqdm: bool) -> list[Any]:
        self.calls.append(params)
        return [SimpleNamespace(outputs=[self._one(*pair)]) for pair in zip(texts, params, strict=True)]

    def _one(self, text: dict[str, list[int]], params: Any) -> Any:
        prefix = text["prompt_token_ids"]
        assert prefix[: len(PROMPT)] == PROMPT and prefix[2:] == self.response[: len(prefix) - 2]
        made: list[int] = []
        for token in self.response[len(prefix) - 2 :][: params.max_tokens]:
            made.append(token)
            if token == self.tokenizer.eos_token_id:
                return SimpleNamespace(token_ids=made, finish_reason="stop", stop_reason=None)
            for stop in getattr(params, "stop", []):
                if stop in self.tokenizer.decode(made):
                    assert params.include_stop_str_in_output
                    return SimpleNamespace(token_ids=made, finish_reason="stop", stop_reason=stop)
        return SimpleNamespace(token_ids=made, finish_reason="length", stop_reason=None)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tokenizer: Any, tmp_path: Path) -> Any:
    def make(**given: Any) -> tuple[Policy, Engine, dict[str, Any]]:
        settings = SelfTrainingSettings.parse(
            {"model": "m", "train_file": "a", "test_file": "b", "max_response_tokens": 64} | given, "self_training"
        )
        engine, options = Engine(tokenizer), {}

        def load_engine(_: Model, log: Path, found: dict[str, Any]) -> Engine:
            options.update(found)
            return engine

        monkeypatch.setattr(module, "load_engine", load_engine)
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
        return Policy(settings, Model("tiny", str(tiny_model), None), 10, tmp_path / "log"), engine, options

    return make


def unroll(policy: Policy) -> list[Proposal]:
    """Steps one after the other up to the end."""
    steps: list[Proposal] = []
    while not steps or not steps[-1].finished:
        prefix = tuple(token for step in steps for token in step.tokens)
        steps += policy.propose([PROMPT], [Request(0, prefix, len(steps), 0.7)])
        assert len(steps) < 20
    return steps


def test_steps_follow_each_other(make: Any) -> None:
    """The steps are the columns and the box; together they are the response, token by token."""
    policy, engine, _ = make(steps={"separator": " "})
    steps = unroll(policy)
    assert [step.text.strip() for step in steps] == TEXT.split(" ")
    assert [token for step in steps for token in step.tokens] == engine.response
    assert [step.finished for step in steps] == [False, False, False, True]
    # The blank of ` \boxed` stands before its step, which was cut off before it and is asked for in two parts.
    assert [len(call) for call in engine.calls] == [1] * 5
    assert policy.tokens == len(engine.response) + 1


def test_the_prompts_of_several_questions(make: Any) -> None:
    """Requests in one call keep their order; whole responses beside steps."""
    policy, engine, _ = make(steps={"separator": " "})
    step, whole = policy.propose([PROMPT], [Request(0, (), 1, 0.7), Request(0, (), 2, 0.0, whole=True)])
    assert step.text == "2+9=11 " and whole.text == TEXT and whole.finished and not step.finished
    (params,) = engine.calls
    assert [one.temperature for one in params] == [0.7, 0.0] and params[0].seed != params[1].seed
    assert not hasattr(params[1], "stop") and [one.max_tokens for one in params] == [64, 64]


def test_a_long_step_is_cut(make: Any) -> None:
    """It goes on as the next step."""
    policy, _, _ = make(steps={"separator": " ", "max_tokens": 4})
    steps = unroll(policy)
    assert [step.text for step in steps[:2]] == ["2+9=", "11 "] and all(len(step.tokens) <= 4 for step in steps)


def test_steps_of_at_least_some_tokens(make: Any) -> None:
    """The first tokens are asked for without a stop, and the separators in them do not count."""
    policy, engine, _ = make(steps={"separator": " ", "min_tokens": 9})
    steps = unroll(policy)
    assert [step.text for step in steps] == ["2+9=11 8+1+1=10 ", "4+3+1=8 \\boxed{801}"]
    assert engine.calls[0][0].max_tokens == 9 and not hasattr(engine.calls[0][0], "stop")
    assert engine.calls[1][0].max_tokens == 55 and engine.calls[1][0].stop == [" "]


def test_a_cut_response_is_not_finished(make: Any) -> None:
    policy, _, _ = make(max_response_tokens=5)
    (found,) = policy.propose([PROMPT], [Request(0, (), 1, 0.7, whole=True)])
    assert len(found.tokens) == 5 and not found.finished


def test_the_rest_after_a_text_is_one_step(make: Any) -> None:
    policy, _, _ = make(steps={"separator": " ", "until": "=11 "})
    assert [step.text for step in unroll(policy)] == ["2+9=11 ", TEXT.removeprefix("2+9=11 ")]
    assert policy.split(policy.tokenizer.encode(TEXT)) == [7, len(policy.tokenizer.encode(TEXT))]


def test_a_dead_engine_is_one_sentence(make: Any, tmp_path: Path) -> None:
    policy, engine, _ = make()
    engine.generate = None
    with pytest.raises(RunStoppedError, match=f"^vLLM stopped; its output is in {tmp_path}/log$"):
        policy.propose([PROMPT], [Request(0, (), 1, 0.7)])


def test_the_options_of_the_engine(make: Any) -> None:
    policy, engine, options = make(engine={"gpu_memory_utilization": 0.5}, gpus=2, seed=3)
    assert options == {"gpu_memory_utilization": 0.5, "max_model_len": 74, "tensor_parallel_size": 2, "seed": 3}
    policy.close()
    assert engine.calls == [["closed"]]
