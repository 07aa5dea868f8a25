"""L2T from the questions to the update: our trainer and worker over verl's.

Around one queue the language-model server and the scorer are stand-ins that answer from the tokens alone; the worker is
also run on the real engine, on one rank and on two.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gcpo.adapters.schema import QueueBatch
from gcpo.adapters.worker import METHOD_CALL
from gcpo.episodes import split_response
from gcpo.faults import RunStoppedError
from gcpo.methods.base import Run
from gcpo.methods.fields import flat, lengths
from gcpo.tokens import TokenReader
from tests.adapters.memory_queue import MemoryQueue
from tests.adapters.ranks import pack, run_on_ranks
from tests.adapters.test_gc2po import GRADER, Writer, outcome_of
from tests.adapters.test_pipeline import (
    groups_of,
    log_probs_of,
    make_trainer,
    questions,
    real,
    roll_out,
    square_of,
    take_step,
)

N = 4
OVERRIDES = ("device=cpu", "method=l2t", f"actor_rollout_ref.rollout.n={N}", "data.max_prompt_length=64")
PROBE = " \\boxed{"


@pytest.fixture
def make_config(recipe_config: Callable, tiny_model: Path) -> Callable:
    """A run of 3 questions x 4 responses, which verl pads to 16 rows for its mini-batches of 8."""

    def make(*overrides: str) -> Any:
        config = recipe_config(
            *OVERRIDES,
            f"actor_rollout_ref.model.path={tiny_model}",
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",
            "actor_rollout_ref.rollout.max_model_len=1024",
            "data.max_response_length=64",
            "data.episode_prompt=null",
            "l2t.episodes.separator=' '",
            *overrides,
        )
        config.l2t.probe.text = PROBE
        return config

    return make


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> MemoryQueue:
    return MemoryQueue().install(monkeypatch)


def a_step(config: Any, queue: MemoryQueue, tokenizer: Any) -> tuple[Any, Any, dict[str, float]]:
    """The stages of verl's step on everything that has been rolled out."""
    trainer = make_trainer(config, queue, tokenizer)
    trainer.method.start_actor(trainer.actor_rollout_wg.engine)
    return trainer, *take_step(trainer, queue)


# ---- one step ------------------------------------------------------------------------------------------------------


def expected_group(
    rows: list[dict[str, Any]], gold: str | None, tokenizer: Any, max_ratio: float, step_size: float
) -> list[list[float]]:
    """Advantages of a group from its tokens, token by token in lists; alpha = .8, beta = .6, trim = .05."""
    answer = tokenizer.encode(f"{gold}}}", add_special_tokens=False) if gold else None
    probe = tokenizer.encode(PROBE, add_special_tokens=False)
    tokens, means = [], []
    for fields in rows:
        prompt, ids = fields["prompts"].tolist(), fields["responses"].tolist()
        spans = split_response(ids, TokenReader(tokenizer), end_ids={tokenizer.eos_token_id}, separator=" ").spans
        shown = [prompt + ids[:end] + probe for end in (0, *(end for _, end in spans))]
        surprise = [-value for value in log_probs_of(fields["prompts"], fields["responses"]).tolist()]
        fit = [0.0] * len(shown)
        if answer:
            values = [log_probs_of(torch.tensor(context), torch.tensor(answer)).double() for context in shown]
            fit = [math.exp(statistics.fmean(entry.tolist())) for entry in values]
        r = {}
        for k, (start, end) in enumerate(spans):
            penalty = (step_size * square_of(fields["responses"][start:end])) ** 2 if answer else 0.0
            reward = outcome_of(ids) / len(spans) + 0.8 * (fit[k + 1] - fit[k] - 0.6 * penalty)
            for j in range(start, end):
                r[j] = reward * surprise[j] / sum(surprise[start:end])
        cut = math.floor(0.025 * len(r))
        tokens.append((r, len(ids)))
        means.append(statistics.fmean(sorted(r.values())[cut : len(r) - cut]))
    advantages = []
    for (r, length), mean in zip(tokens, means, strict=True):
        a = (mean - statistics.fmean(means)) / (statistics.stdev(means) + 1e-6)
        ratio = {j: min(max(value / mean, 0.0), max_ratio) if mean * len(r) > 1e-6 else 1.0 for j, value in r.items()}
        advantages.append([a * ratio.get(j, 1.0) for j in range(length)])
    return advantages


def check_groups(
    queue: MemoryQueue,
    batch: Any,
    tokenizer: Any,
    golds: dict[str, str | None],
    max_ratio: float = 10.0,
    step_size: float = 0.0,
) -> None:
    for uid, keys in groups_of(real(batch)).items():
        rows = [queue.fields["train"][key] for key in keys]
        expected = expected_group(rows, golds.get(uid, "1"), tokenizer, max_ratio, step_size)
        for fields, wanted in zip(rows, expected, strict=True):
            torch.testing.assert_close(fields["advantages"], torch.tensor(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_ratio", [10.0, 1.2])
def test_a_step(max_ratio: float, make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    """What the update finds beside every row is what a referee makes of its group's tokens; a padding row gets nothing
    and is not scored; metrics are finite."""
    config = make_config(f"l2t.max_ratio={max_ratio}")
    roll_out(config, Writer(tokenizer), GRADER)
    trainer, batch, metrics = a_step(config, queue, tokenizer)
    actor = trainer.actor_rollout_wg
    assert actor.calls == ["compute_log_prob", "score", "update_actor"]
    assert len(batch) == 16 and len(real(batch)) == 12
    check_groups(queue, batch, tokenizer, {}, max_ratio)
    for key in set(batch.keys) - set(real(batch)):
        assert not queue.fields["train"][key]["advantages"].any()
        assert queue.fields["train"][key]["l2t_probability"].isnan().all()
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["l2t/tokens/scored"] == pytest.approx(1000) and metrics["l2t/missing_frac"] == 0
    assert metrics["l2t/gain/min"] < 0 < metrics["l2t/gain/max"]
    assert 0 < metrics["l2t/negative_frac"] < 1 and (0 < metrics["l2t/clamped_frac"] < 1) == (max_ratio < 10)
    # The gains of a response add up to the rise from the first to the last probability.
    kept = [queue.fields["train"][key]["l2t_probability"] for key in real(batch)]
    kept = [row[~row.isnan()] for row in kept]
    assert metrics["l2t/probability/first"] == pytest.approx(statistics.fmean(float(row[0]) for row in kept))
    assert metrics["l2t/probability/last"] == pytest.approx(statistics.fmean(float(row[-1]) for row in kept))
    gains = [gain for row in kept for gain in row.diff().tolist()]
    assert metrics["l2t/gain/mean"] == pytest.approx(statistics.fmean(gains))
    assert metrics["l2t/episodes/mean"] == pytest.approx(len(gains) / 12)
    column = trainer.method.dump(QueueBatch(batch, 1), trainer._credit, tokenizer).columns["episodes"]
    by_key = dict(zip(batch.keys, column, strict=True))
    assert {key for key in by_key if by_key[key]} == set(real(batch))
    dumped = [episode["gain"] for key in real(batch) for episode in by_key[key]]
    assert dumped == pytest.approx(gains, rel=1e-3)


def with_truths(*truths: Any) -> Any:
    """The questions, each with a ground truth of its own."""
    from verl.utils import tensordict_utils as tu

    batch = questions()
    tu.assign_non_tensor_stack(batch, "reward_model", [{"style": "rule", "ground_truth": truth} for truth in truths])
    return batch


def test_questions_without_an_answer(
    make_config: Callable, queue: MemoryQueue, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Their gain and their penalty are 0, so that only the outcome counts; of several answers the first is scored; the
    share is said."""
    config = make_config("l2t.penalty=one_step", "l2t.step_size=0.1")
    batch = with_truths({"inputs": ["1"]}, '["12", "3"]', "9" * 40)
    roll_out(config, Writer(tokenizer), GRADER, batch=batch)
    _, batch, metrics = a_step(config, queue, tokenizer)
    assert metrics["l2t/missing_frac"] == pytest.approx(2 / 3)
    check_groups(queue, batch, tokenizer, {"uid0": None, "uid1": "12", "uid2": None}, step_size=0.1)
    kept = [queue.fields["train"][key]["l2t_penalty"] for key in real(batch)]
    known = torch.cat([row[~row.isnan()] for row in kept])
    assert 0 < metrics["l2t/penalty/mean"] == pytest.approx(float(known.mean()))
    assert metrics["l2t/penalty/max"] == pytest.approx(float(known.max()))
    assert (
        "gcpo notice: l2t: 2 of 3 questions of step 1 have no right answer that can be scored, more than "
        "l2t.max_missing=0.25; they have outcome rewards only: the ground truth holds no answer as text, 1 x; the "
        "right answer has more than l2t.probe.max_answer_tokens=32 tokens, 1 x" in caplog.text
    )


def test_no_question_has_an_answer(make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    config = make_config()
    roll_out(config, Writer(tokenizer), GRADER, batch=with_truths(None, "", {"inputs": []}))
    with pytest.raises(RunStoppedError, match="^none of the 3 questions of step 1 has a right answer that can be"):
        a_step(config, queue, tokenizer)


def test_the_order_of_arrival_does_not_matter(
    make_config: Callable, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    runs = []
    for prefix, slow in (("a", lambda at: 0), ("b", lambda at: (7 * at) % 11)):
        config, queue = make_config(), MemoryQueue().install(monkeypatch)
        roll_out(config, Writer(tokenizer, slow), GRADER, batch=questions(prefix=prefix))
        _, batch, _ = a_step(config, queue, tokenizer)
        rows = [queue.fields["train"][key] for key in real(batch)]
        runs.append([[fields[n].tolist() for n in ("responses", "advantages")] for fields in rows])
    assert runs[0] == runs[1]


# ---- the worker on the real engine ---------------------------------------------------------------------------------

TEXTS = ("1+2=3 4+5=9 \\boxed{93}", "1+2=4 \\boxed{94}", "7", "1+2=3 \\boxed{3} 5")


def make_rows(tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """Four responses to one question and four to another; the last row is not asked about."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    rows = []
    for row in range(8):
        pieces = [encode("\n"), encode(PROBE), encode("93}" if row < 4 else "105}")] if row < 7 else [[], [], []]
        rows.append(
            {
                "prompts": torch.tensor(encode(f"What is {12 if row < 4 else 34} + 81?")),
                "responses": torch.tensor([*encode(TEXTS[row % 4]), tokenizer.eos_token_id]),
                "l2t_pieces": flat(pieces),
                "l2t_piece_lengths": lengths(pieces),
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
        method = worker.method
        method.settings = method.parse({"episodes": {"separator": " "}, **settings}, Run(n=N, response_length=64))
        method.start_actor(worker.scoring_engine)
        mine = [rows[i] for i in order[rank * len(order) // world : (rank + 1) * len(order) // world]]
        fields = worker.score(pack(mine, **{METHOD_CALL: 3}))
        found.append({name: [value.tolist() for value in fields[name].unbind()] for name in fields.keys()})
    return found


RUNS = {
    "packed": {},
    "permuted": {"order": [3, 1, 7, 2, 0, 6, 5, 4]},
    "small packs": {"max_token_len_per_gpu": 260},
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
        order = list(settings.get("order", range(8)))
        rows: dict[str, list] = {}
        for column in ranks[0][at]:
            values = [value for rank in ranks for value in rank[at][column]]
            rows[column] = [values[order.index(i)] for i in range(8)]
        found[name] = rows
    return found


def one_at_a_time(tiny_model: Path, tokenizer: Any) -> list[list[float]]:
    """J of every row, each context alone through transformers' model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    found = []
    for fields in make_rows(tokenizer):
        _, probe, answer = (
            fields["l2t_pieces"].split(fields["l2t_piece_lengths"].tolist())
            if len(fields["l2t_pieces"]) > 1
            else ([], [], [])
        )
        values = []
        ends = split_response(
            fields["responses"].tolist(), TokenReader(tokenizer), end_ids={tokenizer.eos_token_id}, separator=" "
        ).spans
        for end in (0, *(end for _, end in ends)) if len(answer) else ():
            context = torch.cat([fields["prompts"], fields["responses"][:end], probe])
            with torch.no_grad():
                logits = model(torch.cat([context, answer])[None]).logits[0, len(context) - 1 : -1]
            chosen = logits.double().log_softmax(-1).gather(1, answer[:, None])
            values.append(float(chosen.mean().exp()))
        found.append(values)
    return found


def test_worker_probabilities(scored: dict[str, dict], tiny_model: Path, tokenizer: Any) -> None:
    """Packed or not, in any order, on any rank: J is what the model gives to each context by itself."""
    wanted = one_at_a_time(tiny_model, tokenizer)
    assert [len(values) for values in wanted] == [4, 3, 2, 4, 4, 3, 2, 0]
    for name, run in scored.items():
        for row, values in enumerate(run["l2t_probability"]):
            known = [value for value in values if not math.isnan(value)]
            assert known == pytest.approx(wanted[row], rel=2e-5), (name, row)
            assert len(values) == 31
        assert [max(index) + 1 for index in run["l2t_index"]] == [3, 2, 1, 3] * 2
        assert all(index[-1] == -1 and -1 not in index[:-1] for index in run["l2t_index"])


def test_worker_counts(scored: dict[str, dict]) -> None:
    """Sharing saves tokens; smaller packs share less."""
    totals = {name: torch.tensor(run["l2t_counts"])[:, :2].sum(0).tolist() for name, run in scored.items()}
    packed, unshared = totals["packed"]
    assert 0 < packed < unshared and totals["small packs"][1] == pytest.approx(unshared)
