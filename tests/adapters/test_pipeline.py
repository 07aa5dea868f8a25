"""A step from the questions to the update: our agent-loop worker and our trainer over verl's, around one queue.

The language-model server, the scorer and the actor's passes are stand-ins that answer from the tokens alone. The engine
is tested in ``test_objective.py`` and ``test_scoring.py``, the processes in ``tests/end_to_end``.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gcpo.adapters import hooks
from gcpo.adapters.rollout import GCPOAgentLoopManager, GCPOAgentLoopWorkerPlain
from gcpo.adapters.schema import from_data, nested, to_columns
from gcpo.adapters.term import UPDATE, UpdateSettings
from gcpo.adapters.trainer import MethodTrainer
from gcpo.adapters.worker import METHOD_CALL
from gcpo.algorithms import causal_advantage, causal_reference, causal_target, causal_weight, group_relative_advantage
from gcpo.methods.base import Method
from gcpo.methods.fields import split as split_rows
from gcpo.methods.gcpo.credit import CausalStage
from gcpo.methods.gcpo.fields import DUMP as DUMP_FIELDS
from gcpo.methods.gcpo.rollout import dumped_draws
from gcpo.methods.gcpo.settings import GCPOConfig
from gcpo.scoring.requests import Score, ScoreRequest
from tests.adapters.conftest import N
from tests.adapters.memory_queue import MemoryQueue

QUESTIONS = 3
END = 2


class Server:
    """Answers with tokens that follow from the prompt and the seed; ``slow`` says in which order requests return."""

    def __init__(self, slow: Callable[[int], int] = lambda at: 0, fails: Callable[[dict], bool] = lambda p: False):
        self.slow, self.fails = slow, fails
        self.requests: list[SimpleNamespace] = []

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict, **kwargs: Any) -> Any:
        from verl.workers.rollout.replica import TokenOutput

        at = len(self.requests)
        params = dict(sampling_params)
        self.requests.append(SimpleNamespace(prompt_ids=list(prompt_ids), **params))
        sampling_params.pop("seed")  # vLLM's server takes the parameters apart in place
        for _ in range(self.slow(at)):
            await asyncio.sleep(0)
        if self.fails(params):
            raise RuntimeError("the server lost the request")
        draw = torch.Generator().manual_seed(params["seed"] + sum(prompt_ids))
        length = int(torch.randint(1, 7, (1,), generator=draw))
        tokens = [*torch.randint(3, 250, (length,), generator=draw).tolist(), END]
        tokens = tokens[: params.get("max_tokens")]
        log_probs = log_probs_of(torch.tensor(prompt_ids), torch.tensor(tokens)).tolist()
        log_probs = log_probs if params["logprobs"] else None
        return TokenOutput(
            token_ids=tokens, log_probs=log_probs, stop_reason="completed", extra_fields={"num_cached_tokens": 3}
        )


class Balancer:
    """Actor handles of verl's load balancer and of its servers, which take turns; remembers who has which."""

    def __init__(self, servers: list[Any]) -> None:
        self.handles = [SimpleNamespace(generate=self._call(server.generate)) for server in servers]
        self.acquired: list[tuple[str, int]] = []
        self.released: list[int] = []
        self.acquire_server = self._call(self._acquire)
        self.release_server = SimpleNamespace(remote=lambda server_id: self.released.append(server_id))
        self.require_acquire_fields = self.require_release_fields = self._call(self._no_fields)

    @staticmethod
    def _call(method: Callable) -> SimpleNamespace:
        return SimpleNamespace(remote=method)

    async def _no_fields(self) -> list[str]:
        return []

    async def _acquire(self, request_id: str) -> tuple[int, Any]:
        at = len(self.acquired) % len(self.handles)
        self.acquired.append((request_id, at))
        return at, self.handles[at]


class Grader:
    """verl's reward-loop worker: the score follows from the response; what it graded is remembered."""

    def __init__(self, score: Callable[[list[int]], float] = lambda ids: float(ids[0] % 3)) -> None:
        self.score, self.graded = score, []
        self.compute_score = SimpleNamespace(remote=self._compute)

    async def _compute(self, data: Any) -> dict[str, Any]:
        ids = data.batch["responses"][0].tolist()
        self.graded.append(ids)
        return {"reward_score": self.score(ids), "reward_extra_info": {"acc": self.score(ids), "format": 1.0}}


def questions(count: int = QUESTIONS, prefix: str = "uid", step: int = 1, validate: bool = False) -> Any:
    """What the trainer hands to the agent-loop manager."""
    from verl.utils import tensordict_utils as tu

    messages = [[{"role": "user", "content": f"What is {12 + i} + 39?"}] for i in range(count)]
    batch = tu.get_tensordict(
        {
            "uid": [f"{prefix}{i}" for i in range(count)],
            "raw_prompt": messages,
            "index": list(range(count)),
            "data_source": ["arithmetic"] * count,
            "reward_model": [{"style": "rule", "ground_truth": "1"}] * count,
        },
        {"global_steps": step},
    )
    if validate:
        tu.assign_non_tensor_data(batch, "validate", True)
    return batch


def roll_out(
    config: Any, server: Server | Balancer, grader: Grader | None = None, batch: Any = None
) -> GCPOAgentLoopWorkerPlain:
    """Let our agent-loop worker answer the questions."""

    from verl.workers.rollout.llm_server import LLMServerClient

    async def work() -> GCPOAgentLoopWorkerPlain:
        client = LLMServerClient(config, server if isinstance(server, Balancer) else Balancer([server]))
        worker = GCPOAgentLoopWorkerPlain(config, client, None, [grader or Grader()])
        await worker.generate_sequences(questions() if batch is None else batch)
        while worker.background_tasks:
            await asyncio.gather(*worker.background_tasks)
        return worker

    return asyncio.run(work())


def state_of(context: torch.Tensor, target: torch.Tensor, at: int) -> torch.Tensor:
    """A hidden state that depends on the token it stands on and on everything before it."""
    ids = torch.cat([context, target])[: at + 1].double()
    return torch.stack([ids[-1].sin() + 2, ids.sum().cos() + 1.5, (ids * torch.arange(len(ids))).sum().sin()]).float()


def log_probs_of(context: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return -1.0 - (target.double() * 0.37 + context.double().sum() * 0.011).sin().float().abs()


def square_of(target: torch.Tensor) -> float:
    return float(target.sum() % 7)


class Scorer:
    """Scores that follow from the tokens."""

    tokens = 1000

    def __call__(self, requests: list[ScoreRequest]) -> list[Score]:
        return [
            Score(
                log_probs_of(request.context, request.target) if request.log_probs else None,
                None if request.state_at is None else state_of(request.context, request.target, request.state_at),
                torch.tensor([square_of(request.target[start:end]) for start, end in request.gradient_of]),
            )
            for request in requests
        ]


class Actor:
    """The worker group: verl's three calls and our ``score``, each on all rows at once."""

    def __init__(self, queue: MemoryQueue, tokenizer: Any, method: Method, scorer: Any = None, world: int = 2) -> None:
        self.queue, self.method, self.scorer = queue, method, scorer or Scorer()
        self.engine = SimpleNamespace(
            tokenizer=tokenizer,
            hidden_size=2,
            scorer=lambda layer, **options: self.scorer,
            perturbed_scorer=lambda layer, **options: self.scorer,
            gather=list,
        )
        self._dispatch_info = {"actor": list(range(world))}
        self.calls: list[str] = []
        self.update: dict[str, Any] = {}

    def compute_log_prob(self, batch: Any) -> Any:
        from tensordict import TensorDict

        self.calls.append("compute_log_prob")
        rows = self.queue.kv_batch_get(batch.keys, batch.partition_id, ["prompts", "responses"])
        values = []
        for prompt, response in zip(rows["prompts"].unbind(), rows["responses"].unbind(), strict=True):
            values.append(torch.zeros(len(prompt) + len(response)))
            # The engine's value at a position is about the next token.
            values[-1][len(prompt) - 1 : -1] = log_probs_of(prompt, response)
        fields = {"log_probs": nested(values), "entropy": nested([torch.ones_like(v) for v in values])}
        return self.queue.kv_batch_put(batch.keys, batch.partition_id, TensorDict(fields, batch_size=len(values)))

    def score(self, request: Any) -> Any:
        self.calls.append("score")
        data = self.queue.kv_batch_get(request.keys, request.partition_id, request.fields)
        self.engine.step = request.extra_info[METHOD_CALL]
        found = self.method.score(from_data(data, self.method.score_inputs), self.engine)
        return self.queue.kv_batch_put(request.keys, request.partition_id, to_columns(found, len(data)))

    def update_actor(self, batch: Any) -> Any:
        from verl.utils import tensordict_utils as tu

        self.calls.append("update_actor")
        self.update = copy.deepcopy(batch.extra_info)
        metrics = {"mfu": [0.0], "loss": [1.0], "gcpo/kl_loss": [0.5], "gcpo/grad_norm/policy": [2.0]}
        return tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": metrics})


def make_trainer(config: Any, queue: MemoryQueue, tokenizer: Any, scorer: Any = None) -> MethodTrainer:
    """Our trainer after verl's set-up, as far as a step needs it."""
    trainer = object.__new__(MethodTrainer)
    trainer.config, trainer.global_steps, trainer.timing_raw = config, 1, {}
    trainer.method, trainer.use_critic = hooks.make_method(config), False
    trainer.tokenizer = tokenizer
    trainer.actor_rollout_wg = Actor(queue, tokenizer, trainer.method, scorer)
    return trainer


def take_step(
    trainer: MethodTrainer, queue: MemoryQueue, keys: list[str] | None = None
) -> tuple[Any, dict[str, float]]:
    """The stages of verl's step on everything that has been rolled out."""
    batch, metrics = queue.meta(keys or queue.finished_rows(), "train"), {}
    batch = trainer._balance_batch(batch, metrics)
    for stage in (trainer._compute_old_log_prob, trainer._compute_advantage, trainer._update_actor):
        batch = stage(batch, metrics)
    return batch, metrics


def real(batch: Any) -> list[str]:
    return [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]


def groups_of(keys: list[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.rsplit("_", 2)[0], []).append(key)
    return groups


# ---- one step ------------------------------------------------------------------------------------------------------


def expected_group(rows: list[dict[str, Any]], gcpo: GCPOConfig) -> dict[str, torch.Tensor]:
    """A, Upsilon, log pi'_ref and which responses have it, of one group, from its tokens with the public functions."""
    shared = gcpo.collider.num_draws
    empty = torch.zeros(0, dtype=torch.long)
    z, conditioned, valid, log_p = [], [], [], []
    for fields in rows:
        y = fields["responses"]
        z.append(state_of(empty, y, len(y) - 1))
        contexts = split_rows(fields["gcpo_contexts"], fields["gcpo_context_lengths"])
        outputs = split_rows(fields["gcpo_outputs"], fields["gcpo_output_lengths"])
        if gcpo.features.source == "prompt":
            cells = [[state_of(x, empty, len(x) - 1) if len(x) else None] for x in contexts]
        else:
            m = gcpo.collider.num_generations
            cells = [
                [state_of(empty, o, len(o) - 1) if len(o) else None for o in outputs[at * m : (at + 1) * m]]
                for at in range(len(contexts))
            ]
        conditioned.append(
            torch.stack([torch.stack([torch.zeros(3) if c is None else c for c in row]) for row in cells])
        )
        valid.append(torch.tensor([[c is not None for c in row] for row in cells]))
        log_p.append([log_probs_of(x, y) if len(x) else torch.zeros(len(y)) for x in contexts])
    z, conditioned, valid = torch.stack(z), torch.stack(conditioned), torch.stack(valid)
    leave_one_out = {}
    if gcpo.leave_one_out_draws:
        leave_one_out = {"z_marginal": conditioned[:, shared:], "valid_marginal": valid[:, shared:]}
    target, has_target = causal_target(z, conditioned[:, :shared], valid[:, :shared], **leave_one_out)
    if gcpo.weighting.target == "group_mean":
        target, has_target = z.mean(0).expand_as(z), torch.ones(len(rows), dtype=torch.bool)
    weight = causal_weight(z, target, has_target, alpha=gcpo.alpha)
    scores = torch.tensor([float(fields["responses"][0] % 3) for fields in rows])
    advantage = group_relative_advantage(scores, torch.zeros(len(rows), dtype=torch.long))
    references = []
    for fields, values in zip(rows, log_p, strict=True):
        present = (fields["gcpo_context_lengths"] > 0)[None]
        values = torch.stack(values)[None]
        leave_one_out = {}
        if gcpo.leave_one_out_draws:
            leave_one_out = {"log_p_marginal": values[:, shared:], "valid_marginal": present[:, shared:]}
        query = log_probs_of(fields["prompts"], fields["responses"])[None]
        log_ref, _, has_reference = causal_reference(values[:, :shared], query, present[:, :shared], **leave_one_out)
        references.append((log_ref[0], bool(has_reference) and float(fields["gcpo_kl_weight"]) > 0))
    return {"advantage": advantage, "weight": weight, "has_target": has_target, "references": references}


GENERATED = ("gcpo.preset=balanced", "gcpo.collider.num_draws=2", "gcpo.features.source=response")
"""L = 2, L' = 1, M = 1."""


@pytest.mark.parametrize(
    "overrides",
    [
        ("gcpo.preset=paper", "gcpo.collider.num_generations=2"),
        GENERATED,
        ("gcpo.preset=balanced",),
        ("gcpo.preset=light",),
        (*GENERATED, "gcpo.collider.max_tokens=5", "gcpo.regenerated.max_tokens=6"),
        (*GENERATED, "gcpo.collider.max_tokens=5", "gcpo.regenerated.max_tokens=6", "gcpo.weighting.missing=one"),
        (*GENERATED, "gcpo.collider.max_tokens=5", "gcpo.regenerated.max_tokens=6", "gcpo.advantage.form=signed"),
    ],
    ids=["paper", "generated", "balanced", "light", "many cut", "many cut, one", "many cut, signed"],
)
def test_a_step(make_config: Callable, queue: MemoryQueue, tokenizer: Any, overrides: tuple[str, ...]) -> None:
    """What the update finds beside every row is what the public functions make of the group's tokens: B on every
    token, the reference of each response, and nothing for a padding row."""
    config = make_config(*overrides)
    roll_out(config, Server())
    trainer = make_trainer(config, queue, tokenizer)
    batch, metrics = take_step(trainer, queue)
    assert len(batch) == 16 and len(real(batch)) == N * QUESTIONS
    groups = [[queue.fields["train"][key] for key in keys] for keys in groups_of(real(batch)).values()]
    expected = [expected_group(rows, trainer.method.settings) for rows in groups]
    weights = [wanted["weight"][wanted["has_target"]] for wanted in expected]
    assert any(not wanted["has_target"].all() for wanted in expected) == ("gcpo.collider.max_tokens=5" in overrides)
    filler = 1.0 if "gcpo.weighting.missing=one" in overrides else float(torch.cat(weights).mean())
    for rows, wanted in zip(groups, expected, strict=True):
        upsilon = torch.where(wanted["has_target"], wanted["weight"], filler)
        form = trainer.method.settings.advantage.form
        advantages = causal_advantage(wanted["advantage"], upsilon, form=form, has_target=wanted["has_target"])
        for fields, b, (log_ref, has_reference) in zip(rows, advantages, wanted["references"], strict=True):
            torch.testing.assert_close(fields["advantages"], b.expand(len(fields["responses"])))
            assert fields["gcpo_kl_mask"].tolist() == [int(has_reference)] * len(fields["responses"])
            if has_reference:
                torch.testing.assert_close(fields["gcpo_log_ref"], log_ref)
    torch.testing.assert_close(metrics["gcpo/upsilon/max"], float(torch.cat(weights).max()))
    scores = [float(queue.fields["train"][key]["rm_scores"].sum()) for key in real(batch)]
    assert metrics["gcpo/reward/acc"] == pytest.approx(sum(scores) / len(scores))
    assert metrics["gcpo/reward/format"] == 1.0
    for key in set(batch.keys) - set(real(batch)):
        fields = queue.fields["train"][key]
        assert fields["advantages"].tolist() == [0.0] and fields["gcpo_kl_mask"].tolist() == [0]
        assert fields["gcpo_context_lengths"].sum() == 0 and fields["gcpo_output_lengths"].sum() == 0
    chosen = [float(fields["gcpo_kl_weight"]) for fields in queue.fields["train"].values()]
    assert sum(chosen[: N * QUESTIONS]) == N * QUESTIONS and (0.0 in chosen[: N * QUESTIONS]) == (
        trainer.method.settings.preset != "paper"
    )
    assert all(math.isfinite(value) for value in metrics.values())
    assert trainer.actor_rollout_wg.calls == ["compute_log_prob", "score", "update_actor"]


def test_the_mean_state_is_that_of_all_responses(make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    """``features.center=batch`` subtracts the mean of z over the batch: without padding rows, and without Z."""
    config = make_config("gcpo.preset=balanced", "gcpo.features.center=batch")
    roll_out(config, Server())
    trainer = make_trainer(config, queue, tokenizer)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        mean_state = CausalStage._mean_state
        patch.setattr(CausalStage, "_mean_state", lambda stage: found.append(mean_state(stage)) or found[-1])
        batch, _ = take_step(trainer, queue)
    z = torch.stack([queue.fields["train"][key]["gcpo_z"] for key in real(batch)])
    assert len(z) == N * QUESTIONS < len(batch)
    torch.testing.assert_close(found[0], z.mean(0))


def test_what_the_update_is_told(make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    """The settings of the kappa term go to the workers for this update alone, and its metrics lose verl's prefix."""
    config = make_config(*GENERATED, "gcpo.kappa=0.03", "gcpo.metrics.grad_norm_every=2")
    roll_out(config, Server())
    trainer = make_trainer(config, queue, tokenizer)
    batch, metrics = take_step(trainer, queue)
    told = trainer.actor_rollout_wg.update
    assert told["global_batch_size"] == told["mini_batch_size"] == 8
    assert told[UPDATE] == UpdateSettings("seq-mean-token-mean", None)
    assert UPDATE not in batch.extra_info
    term = trainer.method.term()
    assert (term.weight, term.max_kl, term.num_shared, term.on_plain_rows) == (0.03, 10.0, 2, False)
    assert (term.packing, term.max_tokens, term.min_shared) == ("tree", 32768, 8)
    assert metrics["gcpo/kl_loss"] == 0.5 and metrics["gcpo/grad_norm/policy"] == 2.0
    assert not [name for name in metrics if name.startswith("actor/gcpo")]
    trainer.global_steps = 2
    trainer._update_actor(batch, {})
    assert trainer.actor_rollout_wg.update[UPDATE].parts == ("policy", "beta", "kappa")


def test_metrics_count_real_rows_once(make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    """Padding rows are copies of a real row; neither its group's counts nor its draws are counted again."""
    config = make_config(*GENERATED)
    server = Server()
    roll_out(config, server)
    trainer = make_trainer(config, queue, tokenizer)
    batch, metrics = take_step(trainer, queue)
    plain = [r for r in server.requests if not hasattr(r, "max_tokens")]
    auxiliary = [r for r in server.requests if hasattr(r, "max_tokens")]
    assert len(plain) == N * QUESTIONS
    prefilled = sum(metrics[f"gcpo/tokens/prefilled/{kind}"] for kind in ("collider", "leave_one_out", "regenerated"))
    assert prefilled == sum(len(request.prompt_ids) for request in auxiliary)
    assert metrics["gcpo/tokens/prefix_cache_hit_frac"] == pytest.approx(3 * len(auxiliary) / prefilled)
    responses = [queue.fields["train"][key]["responses"] for key in real(batch)]
    assert metrics["gcpo/tokens/generated/response"] == sum(map(len, responses))
    rows = [[queue.fields["train"][key] for key in keys] for keys in groups_of(real(batch)).values()]
    scores = [[float(fields["rm_scores"].sum()) for fields in group] for group in rows]
    assert metrics["gcpo/reward/response"] == pytest.approx(statistics.fmean(map(statistics.fmean, scores)))
    assert metrics["gcpo/reward/oracle"] == pytest.approx(statistics.fmean(map(max, scores)))
    assert "gcpo/reward/majority" not in metrics  # no response has a box


def test_the_dump(make_config: Callable, queue: MemoryQueue, tokenizer: Any, tmp_path: Path) -> None:
    """Auxiliary generations are dumped once, by question and kind, beside verl's dump of the responses; none of them
    is a row of the batch."""
    config = make_config(*GENERATED, f"trainer.rollout_data_dir={tmp_path}", "gcpo.metrics.dump_fraction=1")
    server = Server()
    roll_out(config, server)
    trainer = make_trainer(config, queue, tokenizer)
    batch, _ = take_step(trainer, queue)
    assert len(queue.fields["train"]) == 16
    trainer._init_dump_executor()
    trainer._log_rollout_data(batch, {}, str(tmp_path))
    trainer._shutdown_dump_executor()
    lines = [json.loads(line) for line in (tmp_path / "auxiliary" / "1.jsonl").read_text().splitlines()]
    found = Counter((line["uid"], line["kind"]) for line in lines)
    draws = sum(hasattr(request, "max_tokens") for request in server.requests)
    assert len(lines) == draws and {uid for uid, _ in found} == {"uid0", "uid1", "uid2"}
    for i in range(QUESTIONS):
        assert found[f"uid{i}", "collider"] == 2 and found[f"uid{i}", "leave_one_out"] == N
    graded = [line for line in lines if line["outcome"] == "ok"]
    assert graded and all(line["score"] in (0.0, 1.0, 2.0) for line in graded)
    check_dumped_rows(read_lines(tmp_path / "1.jsonl"), queue, batch, trainer.method.settings)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def check_dumped_rows(lines: list[dict[str, Any]], queue: MemoryQueue, batch: Any, settings: GCPOConfig) -> None:
    """The additional keys of the rows are the numbers of the public functions; padding rows have none."""
    by_key = {line["uid"]: line for line in lines}
    assert sorted(by_key) == sorted(batch.keys)
    assert {key for key, line in by_key.items() if not line["padding"]} == set(real(batch))
    for line in by_key.values():
        assert (line["group"] is None) == line["padding"]
    for uid, keys in groups_of(real(batch)).items():
        keys = sorted(keys, key=lambda key: int(key.rsplit("_", 2)[1]))
        rows, found = [queue.fields["train"][key] for key in keys], [by_key[key] for key in keys]
        wanted = expected_group(rows, settings)
        assert [(line["group"], line["index"], line["question"]) for line in found] == [
            (uid, i, int(uid.removeprefix("uid"))) for i in range(N)
        ]
        near = {"rel": 1e-3, "abs": 1e-6}
        assert [line["grpo_advantage"] for line in found] == pytest.approx(wanted["advantage"].tolist(), **near)
        assert [line["upsilon"] for line in found] == pytest.approx(wanted["weight"].tolist(), **near)
        trained = (wanted["advantage"] * wanted["weight"]).tolist()
        assert [line["advantage"] for line in found] == pytest.approx(trained, **near)
        for row, line, (log_ref, has_reference) in zip(rows, found, wanted["references"], strict=True):
            context = split_rows(row["gcpo_contexts"], row["gcpo_context_lengths"])[0]
            log_rho = log_ref - log_probs_of(context, row["responses"])
            kl = float((log_rho.exp() - log_rho - 1).clamp(max=settings.reference.max_kl).mean())
            assert line["kappa_kl"] == (pytest.approx(kl, **near) if has_reference else None)
            assert line["log_rho"] == (pytest.approx(log_rho.tolist(), **near) if has_reference else None)
            assert len(line["tokens"] or ()) == (len(row["responses"]) if has_reference else 0)


def test_the_dump_says_what_stood_in_the_prompts(
    make_config: Callable, queue: MemoryQueue, tokenizer: Any, tmp_path: Path
) -> None:
    """The texts of the blocks, joined in the order that a line names, are the prompts that the server got."""
    overrides = ("gcpo.reference.collider_context=append", "gcpo.blocks.max_tokens=4", "gcpo.collider.max_tokens=5")
    config = make_config(*GENERATED, *overrides, f"trainer.rollout_data_dir={tmp_path}", "gcpo.metrics.dump_fraction=1")
    server = Server()
    roll_out(config, server)
    trainer = make_trainer(config, queue, tokenizer)
    batch, _ = take_step(trainer, queue)
    trainer._init_dump_executor()
    trainer._log_rollout_data(batch, {}, str(tmp_path))
    trainer._shutdown_dump_executor()
    rows, draws = read_lines(tmp_path / "1.jsonl"), read_lines(tmp_path / "auxiliary" / "1.jsonl")
    blocks = {(line["group"], f"response {line['index']}"): line["block"] for line in rows}
    blocks |= {(line["uid"], f"draw {line['draw']}"): line["block"] for line in draws}
    texts = settings_texts(trainer.method.settings.blocks)
    rebuilt = Counter()
    for line in draws:
        question = next(row for row in rows if row["group"] == line["uid"])
        parts = [
            texts[block.split()[0]].format(label=int(block.split()[1]) + 1) + blocks[line["uid"], block]
            for block in line["prompt"]
        ]
        user = question["input"].removesuffix("\nassistant\n")
        rebuilt[user + texts["intro"] + "".join(parts) + texts["outro"] + "\nassistant\n"] += 1
    asked = Counter(
        tokenizer.decode(request.prompt_ids, skip_special_tokens=True)
        for request in server.requests
        if hasattr(request, "max_tokens")
    )
    assert rebuilt == asked
    left_out = {line["left_out"] for line in draws if line["kind"] == "leave_one_out"}
    assert left_out == set(range(N)) and all(
        f"response {line['left_out']}" not in line["prompt"] for line in draws if line["left_out"] is not None
    )


def settings_texts(blocks: Any) -> dict[str, str]:
    """Texts around and before the blocks."""
    return {"intro": blocks.intro, "outro": blocks.outro, "response": blocks.candidate, "draw": blocks.collider}


def test_the_order_of_arrival_does_not_matter(
    make_config: Callable, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    """Whichever response comes first, under whatever id: requests, rows, weights and advantages are the same."""
    config, runs = make_config(*GENERATED), []
    for prefix, slow in (("a", lambda at: 0), ("b", lambda at: (7 * at) % 11)):
        queue, server = MemoryQueue().install(monkeypatch), Server(slow)
        roll_out(config, server, batch=questions(prefix=prefix))
        batch, metrics = take_step(make_trainer(config, queue, tokenizer), queue)
        rows = [queue.fields["train"][key] for key in real(batch)]
        runs.append(
            {
                "places": [key.removeprefix(prefix) for key in real(batch)],
                "rows": [[fields[n].tolist() for n in ("responses", "gcpo_contexts", "advantages")] for fields in rows],
                "requests": sorted((request.seed, request.prompt_ids) for request in server.requests),
                "metrics": {k: v for k, v in metrics.items() if "seconds" not in k and "timing" not in k},
                "arrived": [key.removeprefix(prefix) for key in queue.finished_rows() if "pad" not in key],
            }
        )
    first, second = runs
    assert first["arrived"] != second["arrived"]
    for name in ("places", "rows", "requests", "metrics"):
        assert first[name] == second[name], name
    seeds = [seed for seed, _ in first["requests"]]
    assert len(set(seeds)) == len(seeds)


# ---- what is left out ----------------------------------------------------------------------------------------------


def test_plain_grpo_asks_for_nothing_more(make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    """weighting off and kappa = 0: no request, no forward pass and no field of ours, and advantages of verl's grpo."""
    config = make_config("gcpo.weighting=off", "gcpo.kappa=0")
    server = Server()
    roll_out(config, server)
    trainer = make_trainer(config, queue, tokenizer)
    batch, metrics = take_step(trainer, queue)
    assert len(server.requests) == N * QUESTIONS
    assert trainer.actor_rollout_wg.calls == ["compute_log_prob", "update_actor"]
    assert UPDATE not in trainer.actor_rollout_wg.update
    assert not [name for fields in queue.fields["train"].values() for name in fields if name.startswith("gcpo")]
    advantages = {key: queue.fields["train"][key]["advantages"] for key in batch.keys}
    config.algorithm.adv_estimator = "grpo"
    trainer._compute_advantage(batch, {})
    assert all(torch.equal(queue.fields["train"][key]["advantages"], advantages[key]) for key in batch.keys)


@pytest.mark.parametrize(
    ("overrides", "kinds", "calls"),
    [
        (("gcpo.weighting=off",), {"collider", "leave_one_out"}, True),
        (("gcpo.kappa=0",), {"collider", "leave_one_out", "regenerated"}, True),
        (("gcpo.kappa=0", "gcpo.weighting.target=group_mean"), set(), True),
    ],
    ids=["reference alone", "weighting alone", "mean of the group"],
)
def test_ablations(
    make_config: Callable,
    queue: MemoryQueue,
    tokenizer: Any,
    overrides: tuple[str, ...],
    kinds: set[str],
    calls: bool,
) -> None:
    """Each part alone draws what it needs, and a step goes through."""
    config = make_config(*GENERATED, "trainer.rollout_data_dir=somewhere", "gcpo.metrics.dump_fraction=1", *overrides)
    roll_out(config, Server())
    trainer = make_trainer(config, queue, tokenizer)
    batch, metrics = take_step(trainer, queue)
    rows = [queue.fields["train"][key] for key in real(batch)]
    stored = [draw for row in rows if kinds for draw in dumped_draws(*(row[name] for name in DUMP_FIELDS))]
    assert {draw["kind"] for draw in stored} == kinds
    assert ("score" in trainer.actor_rollout_wg.calls) == calls
    weighted = "gcpo/upsilon/mean" in metrics
    assert weighted == ("gcpo.weighting=off" not in overrides)
    with_reference = "gcpo/reference/kl_mean" in metrics
    assert with_reference == ("gcpo.kappa=0" not in overrides)
    assert ("gcpo_log_ref" in queue.fields["train"][batch.keys[0]]) == with_reference


def test_validation_draws_nothing(make_config: Callable, queue: MemoryQueue) -> None:
    """Validation issues no auxiliary request and stores no field of ours; it is repeated with the same seeds."""
    config, seeds = make_config(*GENERATED), []
    for step in (1, 2):
        server = Server()
        roll_out(config, server, batch=questions(step=step, validate=True))
        assert len(server.requests) == QUESTIONS * config.actor_rollout_ref.rollout.val_kwargs.n
        # Questions are asked at once, so the order in which their requests arrive is nobody's.
        seeds.append(sorted((request.prompt_ids, request.seed) for request in server.requests))
    assert seeds[0] == seeds[1]
    assert "train" not in queue.fields
    assert not [name for fields in queue.fields["val"].values() for name in fields if name.startswith("gcpo")]


def test_draws_are_sampled_as_the_responses_are(make_config: Callable, queue: MemoryQueue) -> None:
    """Temperature, top-p and top-k of the rollout, and the longest sequence that the server takes."""
    params = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}
    overrides = [f"actor_rollout_ref.rollout.{name}={value}" for name, value in params.items()]
    server = Server()
    worker = roll_out(make_config(*GENERATED, *overrides), server)
    assert len(server.requests) > N * QUESTIONS
    assert all(vars(request).items() >= params.items() for request in server.requests)
    assert worker.method.sampling.max_model_len == 1024
    assert END in worker.method.end_ids


def test_a_group_has_one_server(make_config: Callable, queue: MemoryQueue) -> None:
    """It asks the load balancer once and gives the server back once, however many requests it makes."""
    servers = [Server(), Server(), Server()]
    balancer = Balancer(servers)
    roll_out(make_config(*GENERATED), balancer)
    groups = [(name, at) for name, at in balancer.acquired if name.endswith("-gcpo")]
    assert len(groups) == QUESTIONS and len(balancer.acquired) == QUESTIONS * (1 + N)
    assert sorted(balancer.released) == sorted(at for _, at in balancer.acquired)
    made = [sum(hasattr(request, "max_tokens") for request in server.requests) for server in servers]
    assert sum(made) == QUESTIONS * (2 + N + 3 * N)
    assert all(count % (2 + N + 3 * N) == 0 for count in made)


def test_a_load_balancer_without_servers(make_config: Callable, queue: MemoryQueue) -> None:
    """Every draw fails and is counted; nothing is given back that nobody had."""

    class Empty(Balancer):
        async def _acquire(self, request_id: str) -> tuple[int, Any]:
            if request_id.endswith("-gcpo"):
                raise RuntimeError("No available servers in load balancer")
            return await super()._acquire(request_id)

    balancer = Empty([Server()])
    roll_out(make_config("gcpo.preset=light"), balancer, batch=questions(1))
    (stats,) = [entry["stats"] for row in queue.fields["train"].values() if (entry := row["gcpo_group"])]
    assert stats["collider/failed"] == stats["leave_one_out/failed"] == 1.0
    assert len(balancer.released) == N


def test_equal_rewards(make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    """A group with A = 0 draws colliders for the kappa term alone, here for two responses of four."""
    server = Server()
    config = make_config(*GENERATED, "gcpo.metrics.graded_fraction=0")
    roll_out(config, server, Grader(lambda ids: 1.0))
    _, metrics = take_step(make_trainer(config, queue, tokenizer), queue)
    assert len(server.requests) == QUESTIONS * (N + 2 + N // 2)
    assert "gcpo/missing/targets_frac" not in metrics and metrics["gcpo/missing/references_frac"] == 0.0
    assert not any(name in row for row in queue.fields["train"].values() for name in DUMP_FIELDS)  # no dump folder


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_failing_session_blocks_nobody(make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    """The group of a lost session is not for the trainer; the others are complete, and their draws are made."""
    config = make_config("gcpo.preset=light")
    lost: list[int] = []

    def fails(params: dict[str, Any]) -> bool:
        if not lost and params.get("max_tokens") is None:
            lost.append(params["seed"])
        return params["seed"] in lost

    worker = roll_out(config, Server(fails=fails))
    assert worker.groups == {}
    status = Counter(tag["status"] for key, tag in queue.tags["train"].items() if key in ("uid0", "uid1", "uid2"))
    assert status == {"finished": QUESTIONS - 1, "failure": 1}
    batch, _ = take_step(make_trainer(config, queue, tokenizer), queue)
    assert len(real(batch)) == (QUESTIONS - 1) * N


def test_a_session_without_output(make_config: Callable, queue: MemoryQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent loop that gives no output leaves its group complete without it, as verl has it."""
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

    run, calls = SingleTurnAgentLoop.run, []

    async def none_of_the_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return [] if len(calls) == 1 else await run(self, *args, **kwargs)

    monkeypatch.setattr(SingleTurnAgentLoop, "run", none_of_the_first)
    roll_out(make_config("gcpo.preset=balanced"), Server(), batch=questions(1))
    assert queue.tags["train"]["uid0"]["status"] == "finished"
    rows = [fields for key, fields in queue.fields["train"].items()]
    assert len(rows) == N - 1
    assert all(fields["gcpo_context_lengths"].tolist()[0] > 0 for fields in rows)


def test_rewards_that_cannot_be_computed(make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    """A response that cannot be graded scores 0 and is counted; where none can, the run ends with one sentence."""
    config = make_config("gcpo.preset=light")

    def score(ids: list[int]) -> float:
        return math.nan if ids[0] % 2 else 1.0

    roll_out(config, Server(), Grader(score))
    batch, metrics = take_step(make_trainer(config, queue, tokenizer), queue)
    odd = [key for key in real(batch) if queue.fields["train"][key]["responses"][0] % 2]
    assert metrics["gcpo/reward/errors"] == len(odd) > 0
    assert all(queue.fields["train"][key]["rm_scores"].sum() == 0 for key in odd)
    other = MemoryQueue()
    with pytest.MonkeyPatch.context() as patch:
        other.install(patch)
        roll_out(config, Server(), Grader(lambda ids: math.nan))
        with pytest.raises(RuntimeError, match="no finite number on all 12 responses of step 1"):
            take_step(make_trainer(config, other, tokenizer), other)


def test_another_agent_loop_manager(make_config: Callable, queue: MemoryQueue, tokenizer: Any) -> None:
    """Rows that verl's own manager made are refused, with the setting that is missing."""
    roll_out(make_config("gcpo.weighting=off", "gcpo.kappa=0"), Server())
    trainer = make_trainer(make_config("gcpo.preset=light"), queue, tokenizer)
    with pytest.raises(RuntimeError, match="set to gcpo.adapters.rollout.GCPOAgentLoopManager"):
        take_step(trainer, queue)


def test_the_manager_starts_our_worker(make_config: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class that the configuration names wraps our worker, and verl's loader finds it by that name."""
    from verl.utils.import_utils import load_class_from_fqn

    name = make_config().actor_rollout_ref.rollout.agent.agent_loop_manager_class
    manager = load_class_from_fqn(name)
    assert manager is GCPOAgentLoopManager
    monkeypatch.setattr(manager.__mro__[2], "__init__", lambda self, *args, **kwargs: None)
    assert manager().agent_loop_workers_class.__ray_metadata__.modified_class is GCPOAgentLoopWorkerPlain
