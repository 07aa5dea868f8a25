"""GC2PO from the questions to the update: our trainer and worker over verl's.

Around one queue the language-model server and the scorer are stand-ins that answer from the tokens alone; the worker is
also run on the real engine, on one rank and on two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gcpo.adapters.perturbed import EpisodeScore
from gcpo.adapters.registry import credited, method_advantage
from gcpo.adapters.schema import QueueBatch
from gcpo.adapters.trainer import MethodTrainer
from gcpo.adapters.worker import METHOD_CALL
from gcpo.algorithms import episode_reward, group_relative_advantage, token_advantage
from gcpo.episodes import split_response
from gcpo.methods.base import Run
from gcpo.methods.fields import flat, lengths
from gcpo.methods.gc2po.credit import effectiveness
from gcpo.methods.gc2po.method import EpisodeCredit
from gcpo.methods.gc2po.settings import GC2POConfig
from gcpo.scoring.branches import EpisodeRequest
from gcpo.tokens import TokenReader
from tests.adapters.memory_queue import MemoryQueue
from tests.adapters.ranks import pack, run_on_ranks
from tests.adapters.test_pipeline import (
    Grader,
    Server,
    groups_of,
    log_probs_of,
    make_trainer,
    questions,
    real,
    roll_out,
)

N = 4
OVERRIDES = (
    "method=gc2po",
    "device=cpu",
    f"actor_rollout_ref.rollout.n={N}",
    "data.max_prompt_length=64",
    "data.episode_prompt=null",
)


@pytest.fixture
def make_config(recipe_config: Callable, tiny_model: Path) -> Callable:
    """A run of 3 questions x 4 responses, which verl pads to 16 rows for its mini-batches of 8."""

    def make(*overrides: str) -> Any:
        return recipe_config(
            *OVERRIDES,
            f"actor_rollout_ref.model.path={tiny_model}",
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",
            "actor_rollout_ref.rollout.max_model_len=1024",
            "data.max_response_length=64",
            "gc2po.episodes.separator=' '",
            *overrides,
        )

    return make


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> MemoryQueue:
    return MemoryQueue().install(monkeypatch)


class Writer(Server):
    """Writes one to three sums and boxes an answer, except in questions whose prompt contains ``silent``."""

    def __init__(self, tokenizer: Any, slow: Callable[[int], int] = lambda at: 0, silent: str = "no such") -> None:
        super().__init__(slow)
        self.tokenizer, self.silent = tokenizer, silent

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict, **kwargs: Any) -> Any:
        from dataclasses import replace

        seed = sampling_params["seed"]
        output = await super().generate(request_id, prompt_ids=prompt_ids, sampling_params=sampling_params, **kwargs)
        draw = torch.Generator().manual_seed(seed)
        digits = torch.randint(0, 9, (4,), generator=draw).tolist()
        text = " ".join(f"{d}+1={d + 1}" for d in digits[: 1 + digits[3] % 3])
        if self.silent not in self.tokenizer.decode(prompt_ids):
            text += f" \\boxed{{{digits[0] % 3}}}"
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        fields = {"token_ids": ids, "log_probs": [-1.0] * len(ids) if output.log_probs else None}
        return output.model_copy(update=fields) if hasattr(output, "model_copy") else replace(output, **fields)


def fake_states(request: EpisodeRequest) -> torch.Tensor:
    """States that depend on every token up to their place."""
    ids = torch.cat([request.prompt, request.response]).double()
    places = [len(request.prompt) - 1, *(len(request.prompt) + end for end in request.ends)]
    return torch.stack([torch.stack([ids[: p + 1].sum().sin() + 2, ids[p].cos()]) for p in places]).float()


class Scorer:
    """Scores that follow from the tokens and the noise; what it was asked is remembered."""

    path_tokens, branch_tokens, unshared_tokens = 70, 30, 500

    def __init__(self) -> None:
        self.calls: list[list[EpisodeRequest]] = []

    def __call__(self, requests: list[EpisodeRequest]) -> list[EpisodeScore]:
        self.calls.append(list(requests))
        return [
            EpisodeScore(
                fake_states(r) if r.states else None,
                r.noise.double().square().sum(-1) * 3 + r.response.double().mean() / 1000,
            )
            for r in requests
        ]


def take_step(config: Any, queue: MemoryQueue, tokenizer: Any) -> tuple[MethodTrainer, Any, dict[str, float]]:
    """The stages of verl's step on everything that has been rolled out."""
    trainer = make_trainer(config, queue, tokenizer, Scorer())
    engine = trainer.actor_rollout_wg.engine
    engine.layers, engine.tree_problem = 2, lambda: None
    trainer.method.start_actor(engine)
    batch, metrics = queue.meta(queue.finished_rows(), "train"), {}
    batch = trainer._balance_batch(batch, metrics)
    for stage in (trainer._compute_old_log_prob, trainer._compute_advantage, trainer._update_actor):
        batch = stage(batch, metrics)
    return trainer, batch, metrics


GRADER = Grader(lambda ids: float(ids[0] % 3) / 2)


def outcome_of(ids: list[int]) -> float:
    return float(ids[0] % 3) / 2


# ---- one step ------------------------------------------------------------------------------------------------------


def expected_group(rows: list[dict[str, Any]], requests: dict[str, EpisodeRequest], tokenizer: Any) -> torch.Tensor:
    """Advantages of a group from its tokens with the public functions."""
    longest = max(len(fields["responses"]) for fields in rows)
    robust, effect, mask, index, old = [], [], [], [], []
    for fields in rows:
        ids = fields["responses"].tolist()
        split = split_response(ids, TokenReader(tokenizer), end_ids={tokenizer.eos_token_id}, separator=" ")
        request = requests[str(ids) + str(fields["prompts"].tolist())]
        assert request.ends == split.ends
        (score,) = Scorer()([request])
        fill = [0.0] * (10 - len(split.spans))
        robust.append([*(-score.divergence.mean(-1)).exp().tolist(), *fill])
        effect.append([*effectiveness(fake_states(request)).tolist(), *fill])
        mask.append([1] * len(ids) + [0] * (longest - len(ids)))
        index.append(split.index(longest))
        values = log_probs_of(fields["prompts"], fields["responses"]).tolist()
        old.append(values + [0.0] * (longest - len(ids)))
    robust, effect, index = torch.tensor(robust), torch.tensor(effect), torch.tensor(index)
    exists = torch.arange(10) < index.amax(1, keepdim=True) + 1
    outcome = torch.tensor([outcome_of(fields["responses"].tolist()) for fields in rows])
    reward = episode_reward(outcome, robust, effect, exists)
    return token_advantage(reward, index, torch.tensor(old), torch.tensor(mask))


@pytest.mark.parametrize("intervention", ["hidden_state", "lm_head"])
def test_a_step(make_config: Callable, queue: MemoryQueue, tokenizer: Any, intervention: str) -> None:
    """What the update finds beside every row is what the public functions make of its group's tokens; a padding row
    gets nothing and is not scored; metrics are finite."""
    config = make_config(f"gc2po.intervention={intervention}")
    roll_out(config, Writer(tokenizer), GRADER)
    trainer, batch, metrics = take_step(config, queue, tokenizer)
    actor = trainer.actor_rollout_wg
    assert actor.calls == ["compute_log_prob", "score", "update_actor"]
    ((*requests,),) = actor.scorer.calls
    assert len(batch) == 16 and len(requests) == len(real(batch)) == 12
    by_tokens = {str(r.response.tolist()) + str(r.prompt.tolist()): r for r in requests}
    for keys in groups_of(real(batch)).values():
        rows = [queue.fields["train"][key] for key in keys]
        wanted = expected_group(rows, by_tokens, tokenizer)
        for fields, values in zip(rows, wanted, strict=True):
            torch.testing.assert_close(fields["advantages"], values[: len(fields["responses"])], rtol=1e-4, atol=1e-5)
    for key in set(batch.keys) - set(real(batch)):
        assert not queue.fields["train"][key]["advantages"].any()
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["gc2po/tokens/path"] == pytest.approx(70, rel=1e-5)
    assert metrics["gc2po/tokens/scored"] == pytest.approx(100, rel=1e-5)
    assert 0 < metrics["gc2po/robustness/mean"] < 1 and metrics["gc2po/fallback/groups_frac"] == 0
    assert metrics["gc2po/reward/errors"] == 0 and metrics["gc2po/advantage/spread_in_response"] > 0
    answers = {len(r.answers) for r in requests}
    assert answers == {0} if intervention == "lm_head" else max(answers) > 1
    if intervention == "hidden_state":
        first = tokenizer.decode(requests[0].answers[0])
        assert first == "1}", "the gold answer of these questions"
        assert tokenizer.decode(requests[0].probe) == "\n\nFinal answer: \\boxed{"


def test_no_parsable_answer_in_a_group(make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    """It trains with verl's GRPO advantage and is counted; nothing is scored for it."""
    config = make_config()
    roll_out(config, Writer(tokenizer, silent="13 + 39"), GRADER)
    trainer, batch, metrics = take_step(config, queue, tokenizer)
    assert metrics["gc2po/fallback/groups_frac"] == pytest.approx(1 / 3)
    ((*requests,),) = trainer.actor_rollout_wg.scorer.calls
    assert len(requests) == 8
    rows = [queue.fields["train"][key] for key in groups_of(real(batch))["uid1"]]
    outcome = torch.tensor([outcome_of(fields["responses"].tolist()) for fields in rows])
    wanted = group_relative_advantage(outcome, torch.zeros(N, dtype=torch.long))
    for fields, value in zip(rows, wanted, strict=True):
        torch.testing.assert_close(fields["advantages"], value.expand(len(fields["responses"])))
    check_dump(trainer, queue, batch, tokenizer)


def check_dump(trainer: MethodTrainer, queue: MemoryQueue, batch: Any, tokenizer: Any) -> None:
    """The dump has the texts of the episodes, their terms, and the advantage that the update finds; none in a group
    without an answer and in padding rows."""
    column = trainer.method.dump(QueueBatch(batch, 1), trainer._credit, tokenizer).columns["episodes"]
    scored = {key for key in real(batch) if not key.startswith("uid1_")}
    assert {key for key, episodes in zip(batch.keys, column, strict=True) if episodes} == scored
    for key, episodes in zip(batch.keys, column, strict=True):
        fields = queue.fields["train"][key]
        for k, episode in enumerate(episodes or ()):
            tokens = fields["gc2po_index"] == k
            assert episode["text"] == tokenizer.decode(fields["responses"][tokens])
            assert episode["advantage"] == pytest.approx(float(fields["advantages"][tokens].mean()), rel=1e-3)
            assert episode["robustness"] == pytest.approx(math.exp(-float(fields["gc2po_divergence"][k])), rel=1e-3)
            assert episode["effectiveness"] == pytest.approx(float(fields["gc2po_effectiveness"][k]), rel=1e-3)
        assert len(episodes or ()) in (0, int(fields["gc2po_index"].max()) + 1)


def test_nothing_parsable_at_all(make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    """A batch that falls back as a whole is GRPO."""
    config = make_config("gc2po.intervention=lm_head")
    roll_out(config, Writer(tokenizer, silent="+"), GRADER)
    _, batch, metrics = take_step(config, queue, tokenizer)
    assert metrics["gc2po/fallback/groups_frac"] == 1.0
    assert all(math.isfinite(value) for name, value in metrics.items() if name.startswith("gc2po"))
    assert all(queue.fields["train"][key]["advantages"].isfinite().all() for key in batch.keys)


@pytest.mark.parametrize(
    "overrides",
    [
        ("gc2po.counterfactual=off",),
        ("gc2po.perturbation.sigma=0",),
        ("gc2po.perturbation.sigma=0", "gc2po.intervention=lm_head"),
    ],
)
def test_nothing_is_perturbed(
    make_config: Callable, queue: MemoryQueue, tokenizer: Any, overrides: tuple[str, ...]
) -> None:
    """sigma = 0: no branch is run and robustness is exactly 1. counterfactual=off: the model is not asked at all."""
    config = make_config(*overrides)
    roll_out(config, Writer(tokenizer), GRADER)
    trainer, _, metrics = take_step(config, queue, tokenizer)
    calls = trainer.actor_rollout_wg.scorer.calls
    if "gc2po.counterfactual=off" in overrides:
        assert not calls and metrics["gc2po/tokens/scored"] == 0
        assert 0 < metrics["gc2po/robustness/min"] and metrics["gc2po/effectiveness/max"] <= 1
    else:
        assert [r.asked for r in calls[0]] == [()] * 12
        assert metrics["gc2po/robustness/min"] == metrics["gc2po/robustness/max"] == 1.0


@pytest.mark.parametrize("distribution", ["gaussian", "group"])
def test_the_order_of_arrival_does_not_matter(
    make_config: Callable, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, distribution: str
) -> None:
    """Whichever response comes first, under whatever id: the same seed gives the same rewards and advantages, because
    perturbations follow from the tokens of a response; another seed gives others."""
    runs = []
    for prefix, slow, seed in (("a", lambda at: 0, 0), ("b", lambda at: (7 * at) % 11, 0), ("c", lambda at: 0, 1)):
        config = make_config(
            f"gc2po.perturbation.distribution={distribution}", f"gc2po.seed={seed}", "gc2po.episodes.max_perturbed=2"
        )
        config.gc2po.perturbation.draws = 2
        queue = MemoryQueue().install(monkeypatch)
        roll_out(config, Writer(tokenizer, slow), GRADER, batch=questions(prefix=prefix))
        _, batch, metrics = take_step(config, queue, tokenizer)
        rows = [queue.fields["train"][key] for key in real(batch)]
        runs.append([[fields[n].tolist() for n in ("responses", "advantages")] for fields in rows])
    assert runs[0] == runs[1]
    assert [r for r, _ in runs[0]] == [r for r, _ in runs[2]] and runs[0] != runs[2]


def test_the_estimator_outside_our_trainer_is_refused() -> None:
    """Nothing else finds episodes, so it does not fall back to GRPO silently."""
    arguments = (torch.ones(2, 1), torch.ones(2, 1), np.array(["a", "a"], dtype=object))
    with pytest.raises(RuntimeError, match="trainer.v1.trainer_mode=gc2po"):
        method_advantage(*arguments, config={"adv_estimator": "gc2po"})
    with credited(EpisodeCredit(GC2POConfig(), [], [])):
        assert method_advantage(*arguments)[0].tolist() == [[0.0], [0.0]]


def test_the_prompt_asks_for_tags(recipe_config: Callable, tmp_path: Path, tokenizer: Any) -> None:
    """Every question of the data set that verl makes ends with it, and its length counts."""
    from verl.utils.dataset.rl_dataset import get_dataset_class

    from examples.arithmetic.task import prepare
    from gcpo.episodes import EPISODE_PROMPT

    prepare(tmp_path, train_size=6, test_size=6)
    config = recipe_config("method=gc2po", "device=cpu", f"+data.cache_dir={tmp_path}/cache").data
    make = get_dataset_class(config)
    files = str(tmp_path / "train.parquet")
    data = make(data_files=files, tokenizer=tokenizer, processor=None, config=config)
    assert config.episode_prompt == EPISODE_PROMPT and len(data) == 6
    content = data[0]["raw_prompt"][-1]["content"]
    assert content.startswith("What is ") and content.endswith("?" + EPISODE_PROMPT)
    config.max_prompt_length = 40
    assert len(make(data_files=files, tokenizer=tokenizer, processor=None, config=config)) == 0
    config.episode_prompt = None
    plain = make(data_files=files, tokenizer=tokenizer, processor=None, config=config)
    assert len(plain) == 6 and plain[0]["raw_prompt"][-1]["content"].endswith("?")


# ---- the worker on the real engine ---------------------------------------------------------------------------------


def make_rows(tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """Four responses to one question and four to another; the last group has one answer alone."""

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False))

    texts = ["1+2=3 4+5=9 \\boxed{93}", "1+2=4 \\boxed{94}", "7", "1+2=3 \\boxed{3} 5"]
    rows = []
    for row in range(8):
        answers = ["93}", "94}", "3}"] if row < 4 else ["5}"]
        rows.append(
            {
                "prompts": encode(f"What is {12 if row < 4 else 34} + 81?"),
                "responses": torch.cat([encode(texts[row % 4]), torch.tensor([tokenizer.eos_token_id])]),
                "gc2po_place": torch.tensor([1, row // 4, row]),
                "gc2po_answers": flat([encode(a).tolist() for a in answers]),
                "gc2po_answer_lengths": lengths([encode(a).tolist() for a in answers]),
                "gc2po_probe": encode(" \\boxed{"),
            }
        )
    return rows


def score_on_ranks(rank: int, world: int, config: Any, rows: list[dict[str, torch.Tensor]], runs: list[dict]) -> Any:
    """``score`` of a real worker with other settings in turn; the fields of this rank's rows as lists."""
    from tests.adapters.ranks import build_worker

    worker = build_worker(config)
    found = []
    for settings in runs:
        order = settings.pop("order", list(range(len(rows))))
        raw = {"episodes": {"separator": " "}, **settings}
        method = worker.method
        method.settings = method.parse(raw, Run(n=N, response_length=64))
        method.start_actor(worker.scoring_engine)
        mine = [rows[i] for i in order[rank * len(order) // world : (rank + 1) * len(order) // world]]
        fields = worker.score(pack(mine, **{METHOD_CALL: 3}))
        found.append({name: [value.tolist() for value in fields[name].unbind()] for name in fields.keys()})
    return found


RUNS = {
    "hidden_state": {},
    "again": {},
    "permuted": {"order": [3, 1, 0, 2, 7, 6, 5, 4]},
    "another seed": {"seed": 5},
    "one row at a time": {"max_token_len_per_gpu": 420},
    "nothing": {"perturbation": {"sigma": 0.0}},
    "subset": {"episodes": {"separator": " ", "max_perturbed": 1}},
    "lm_head": {"intervention": "lm_head"},
    "group": {"perturbation": {"distribution": "group"}},
    "group, permuted": {"perturbation": {"distribution": "group"}, "order": [3, 1, 0, 2, 7, 6, 5, 4]},
    "group, head": {"perturbation": {"distribution": "group", "draws": 2}, "intervention": "lm_head"},
    "off": {"counterfactual": False},
}


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def scored(
    request: pytest.FixtureRequest, recipe_config: Callable, tiny_model: Path, tokenizer: Any
) -> dict[str, dict]:
    """The fields of all rows, in their own order, for every run."""
    config = recipe_config(*OVERRIDES, f"actor_rollout_ref.model.path={tiny_model}")
    ranks = run_on_ranks(request.param, score_on_ranks, config, make_rows(tokenizer), list(RUNS.values()))
    found = {}
    for at, (name, settings) in enumerate(RUNS.items()):
        order = settings.get("order", range(8))
        rows: dict[str, list] = {}
        for column in ranks[0][at]:
            values = [value for rank in ranks for value in rank[at][column]]
            rows[column] = [values[list(order).index(i)] for i in range(8)]
        found[name] = rows
    return found


def divergence(run: dict[str, list]) -> torch.Tensor:
    return torch.tensor(run["gc2po_divergence"], dtype=torch.float64)


def test_worker_episodes(scored: dict[str, dict], tokenizer: Any) -> None:
    """Spans by the response's own tokens, the end token outside; a value for every episode, NaN beyond; one answer:
    nothing is perturbed; nothing is perturbed with sigma 0."""
    run = scored["hidden_state"]
    assert [max(index) + 1 for index in run["gc2po_index"]] == [3, 2, 1, 3] * 2
    assert all(index[-1] == -1 and -1 not in index[:-1] for index in run["gc2po_index"])
    for row, values in enumerate(divergence(run)):
        number = [3, 2, 1, 3][row % 4] if row < 4 else 0
        assert values[number:].isnan().all() and (values[:number] > 0).all()
        effect = torch.tensor(run["gc2po_effectiveness"][row])
        number = [3, 2, 1, 3][row % 4]
        assert effect[number:].isnan().all() and ((effect[:number] > 0) & (effect[:number] <= 1)).all()
    assert divergence(scored["nothing"]).isnan().all()
    assert divergence(scored["off"]).isnan().all() and torch.tensor(scored["off"]["gc2po_effectiveness"]).isnan().all()
    assert divergence(scored["lm_head"])[4:, 0].isfinite().all(), "lm_head needs no answers"
    assert (divergence(scored["subset"]).isfinite().sum(1) == torch.tensor([1] * 4 + [0] * 4)).all()


def test_worker_seeds_and_order(scored: dict[str, dict]) -> None:
    """The same seed gives the same values, wherever a row stands in its group, on whatever rank, in whatever row of the
    packing; another seed gives others."""
    wanted = divergence(scored["hidden_state"])
    assert torch.equal(torch.nan_to_num(wanted), torch.nan_to_num(divergence(scored["again"])))
    for name in ("permuted", "one row at a time"):
        torch.testing.assert_close(divergence(scored[name]), wanted, rtol=1e-3, atol=1e-7, equal_nan=True)
    assert (divergence(scored["another seed"])[:4, 0] != wanted[:4, 0]).all()
    group = divergence(scored["group"])
    torch.testing.assert_close(divergence(scored["group, permuted"]), group, rtol=1e-3, atol=1e-7, equal_nan=True)
    assert (group[:4, 0] > 0).all() and (divergence(scored["group, head"])[:, 0] > 0).all()


def test_worker_counts(scored: dict[str, dict]) -> None:
    """Tokens with sharing are fewer than without, and none where the model is not asked."""
    for name, run in scored.items():
        path, branches, unshared, _, malformed = torch.tensor(run["gc2po_counts"]).sum(0).tolist()
        assert malformed == 0
        if name == "off":
            assert path == branches == unshared == 0
        elif name != "nothing":
            assert 0 < path and 0 < branches and path + branches < unshared
