"""Three training steps on stored responses, and every number that they give.

Sampling plays no part: a server answers each session from ``responses.json`` by its number, and any other request by
the prompt and by how often that prompt came before. Everything after the server is real: our agent-loop worker, the
trainer's stages, verl's worker and our FSDP engine, in float32 on one rank. Ray, vLLM and TransferQueue's processes are
not covered here but in ``tests/end_to_end``.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
STEPS = 3
LEARNING_RATE = 1e-3

COMMON = (
    "device=cpu",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.max_model_len=1024",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "data.max_prompt_length=64",
    "data.max_response_length=48",
)
GCPO = ("gcpo.metrics.graded_fraction=0", "gcpo.metrics.grad_norm_every=1")
GC2PO = ("method=gc2po", "data.episode_prompt=null", "gc2po.episodes.separator=' '")

RUNS: dict[str, tuple[str, ...]] = {
    "grpo": ("method=grpo", *GCPO),
    "paper": (*GCPO, "gcpo.preset=paper"),
    "balanced": (*GCPO, "gcpo.preset=balanced"),
    "light": (*GCPO, "gcpo.preset=light"),
    "balanced, query": (*GCPO, "gcpo.preset=balanced", "gcpo.reference.policy_condition=query"),
    "gc2po, hidden_state, gaussian": (*GC2PO, "gc2po.intervention=hidden_state"),
    "gc2po, hidden_state, group": (
        *GC2PO,
        "gc2po.intervention=hidden_state",
        "gc2po.perturbation.distribution=group",
    ),
    "gc2po, lm_head, gaussian": (*GC2PO, "gc2po.intervention=lm_head"),
    "gc2po, lm_head, group": (*GC2PO, "gc2po.intervention=lm_head", "gc2po.perturbation.distribution=group"),
}
"""Name of a run, and its overrides."""


def file_of(name: str) -> Path:
    """Where the numbers of a run are stored."""
    return FOLDER / (name.replace(", ", "_") + ".json")


def make_model(folder: Path) -> Path:
    """The random model of two layers that all runs start from."""
    from examples.arithmetic.warm_start import Recipe, make_tokenizer
    from examples.arithmetic.warm_start import make_model as build

    recipe = Recipe(hidden_size=32, intermediate_size=48, layers=2, heads=2, initializer_range=0.3)
    tokenizer = make_tokenizer(recipe)
    build(recipe, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_here(name: str, model: Path) -> dict[str, Any]:
    """`run` in a process of its own; what it returns is what JSON keeps of it."""
    from tests.adapters.ranks import run_on_ranks

    recipe = FOLDER.parents[1] / "gcpo" / "config"
    return json.loads(json.dumps(run_on_ranks(1, run, name, str(model), str(recipe))[0]))


def differences(expected: Any, found: Any, *, tolerance: float | None = None, path: str = "") -> list[str]:
    """Where two results differ, a sentence each.

    Args:
        expected: the stored result.
        found: the new one.
        tolerance: numbers may differ by this share of 1 + their size, and digests are not compared; ``None``: all is
            compared bit for bit.
        path: where in the results these two stand.
    """
    if path == ".made_with" or (tolerance is not None and path.endswith(".sha256")):
        return []
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = [*expected, *(key for key in found if key not in expected)]
        missing = [f"{path}.{key} is only in one of them" for key in keys if (key in expected) != (key in found)]
        return missing + [
            line
            for key in keys
            if key in expected and key in found
            for line in differences(expected[key], found[key], tolerance=tolerance, path=f"{path}.{key}")
        ]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, tolerance=tolerance, path=f"{path}[{i}]")]
    if isinstance(expected, float) and isinstance(found, float) and tolerance is not None:
        close = abs(expected - found) <= tolerance * (1 + abs(expected))
        return [] if close else [f"{path}: {expected} became {found}"]
    return [] if expected == found else [f"{path}: {expected} became {found}"]


def stored() -> dict[str, Any]:
    """``questions``, each with its ``responses`` as [text, reward] pairs, and ``draws``: texts for other requests."""
    return json.loads((FOLDER / "responses.json").read_text())


SESSION: ContextVar[int] = ContextVar("session")
"""The number of the session that a request belongs to; requests of a question arrive in any order."""


def name_sessions(patch: Any) -> None:
    """Let our agent-loop worker set ``SESSION`` while a session runs."""
    from gcpo.adapters.rollout import GCPOAgentLoopWorkerPlain

    original = GCPOAgentLoopWorkerPlain._run_agent_loop

    async def run_agent_loop(self: Any, sampling_params: dict, trajectory: dict, **kwargs: Any) -> Any:
        SESSION.set(int(kwargs["session_id"]))
        return await original(self, sampling_params, trajectory, **kwargs)

    patch.setattr(GCPOAgentLoopWorkerPlain, "_run_agent_loop", run_agent_loop)


class StoredServer:
    """Answers the n sessions of a question with its stored responses, and every other request with a stored draw."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        content = stored()
        self.draws: list[str] = content["draws"]
        self.responses: dict[str, list[str]] = {
            question["question"]: [text for text, _ in question["responses"]] for question in content["questions"]
        }
        self.seen: Counter[tuple[int, ...]] = Counter()

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict, **kwargs: Any) -> Any:
        """One request of verl's client."""
        from verl.workers.rollout.replica import TokenOutput

        prompt = tuple(prompt_ids)
        text = self.tokenizer.decode(prompt)
        asked = [question for question in self.responses if question in text]
        assert len(asked) == 1, f"one stored question should stand in the prompt {text!r}"
        answers = self.responses[asked[0]]
        if any(answer in text for answer in answers):
            digest = hashlib.sha256(repr((prompt, self.seen[prompt])).encode()).digest()
            self.seen[prompt] += 1
            answer = self.draws[int.from_bytes(digest[:4], "big") % len(self.draws)]
        else:
            answer = answers[SESSION.get()]
        ids = [*self.tokenizer.encode(answer, add_special_tokens=False), self.tokenizer.eos_token_id]
        return TokenOutput(
            token_ids=ids,
            log_probs=[-1.0] * len(ids) if sampling_params.get("logprobs") else None,
            stop_reason="completed",
            extra_fields={"num_cached_tokens": 0},
        )


class InProcessGroup:
    """A worker group of one rank: verl's dispatch from and to the queue, without Ray."""

    def __init__(self, queue: Any, worker: Any) -> None:
        self.queue, self.worker = queue, worker
        self._dispatch_info = {"actor": [0]}

    def __getattr__(self, name: str) -> Any:
        from tensordict import TensorDict
        from verl.utils import tensordict_utils as tu

        method = getattr(self.worker, name)

        def call(batch: Any) -> Any:
            data = self.queue.kv_batch_get(batch.keys, batch.partition_id, batch.fields)
            tu.assign_non_tensor(data, **copy.deepcopy(batch.extra_info))
            output = method(data)
            columns = {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}
            if not columns:
                return output  # the metrics of an update
            fields = TensorDict(columns, batch_size=len(data))
            return self.queue.kv_batch_put(batch.keys, batch.partition_id, fields)

        return call


def build_trainer(config: Any, queue: Any, tokenizer: Any) -> Any:
    """The trainer of the configured mode, with a worker of its own for the actor and for the reference."""
    from omegaconf import open_dict
    from verl.trainer.ppo.v1.trainer_base import get_trainer_cls

    from gcpo.adapters import hooks
    from gcpo.adapters.worker import MethodWorker

    trainer = object.__new__(get_trainer_cls(config.trainer.v1.trainer_mode))
    trainer.method = hooks.make_method(config)
    trainer.config, trainer.timing_raw, trainer.tokenizer = config, {}, tokenizer
    trainer.use_critic, trainer.ref_in_actor = False, False
    hooks.send_to_workers(trainer.method, config)

    def build(role: str) -> Any:
        part = copy.deepcopy(config.actor_rollout_ref)
        with open_dict(part):
            part.actor.optim.update({"lr": LEARNING_RATE, "total_training_steps": 10, "lr_warmup_steps": 0})
        worker = MethodWorker(part, role=role)
        worker.init_model()
        return worker

    actor = build("actor")
    trainer.actor_rollout_wg = InProcessGroup(queue, actor)
    trainer.ref_policy_wg = InProcessGroup(queue, build("ref"))
    return trainer, actor


def run(
    rank: int, world: int, name: str, model: str, recipe: str, overrides: Sequence[str] = (), steps: int = STEPS
) -> dict[str, Any]:
    """The numbers of one entry of ``RUNS``: advantages, Upsilon, the reference, losses, gradient norms, weights.

    Args:
        rank: 0.
        world: 1.
        name: of the entry.
        model: folder of the model.
        recipe: folder of the recipe's configuration.
        overrides: more overrides; the stored numbers are those without any.
        steps: number of steps.
    """
    import pytest
    from hydra import compose, initialize_config_dir
    from transformers import AutoTokenizer

    from tests.adapters.memory_queue import MemoryQueue
    from tests.adapters.ranks import weights
    from tests.adapters.test_pipeline import Grader, roll_out

    assert world == 1
    with initialize_config_dir(recipe, version_base=None):
        config = compose("gcpo_trainer", [*COMMON, *RUNS[name], f"actor_rollout_ref.model.path={model}", *overrides])
    tokenizer = AutoTokenizer.from_pretrained(model)
    content = stored()
    reward = {
        tuple(tokenizer.encode(text, add_special_tokens=False)): value
        for question in content["questions"]
        for text, value in question["responses"]
    }
    found: dict[str, Any] = {"steps": []}
    with pytest.MonkeyPatch.context() as patch:
        name_sessions(patch)
        for step in range(1, steps + 1):
            queue = MemoryQueue().install(patch)
            if step == 1:
                trainer, actor = build_trainer(config, queue, tokenizer)
            trainer.actor_rollout_wg.queue = trainer.ref_policy_wg.queue = queue
            trainer.global_steps = step
            grader = Grader(lambda ids: reward[tuple(ids[:-1])])
            roll_out(config, StoredServer(tokenizer), grader, _questions(content, step))
            found["steps"].append(_step(trainer, queue))
        found["weights"] = {key: _summary(value) for key, value in weights(actor.actor.engine).items()}
    found["made_with"] = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    return found


def _questions(content: dict[str, Any], step: int) -> Any:
    from verl.utils import tensordict_utils as tu

    asked = [question["question"] for question in content["questions"]]
    return tu.get_tensordict(
        {
            "uid": [f"step{step}-{i}" for i in range(len(asked))],
            "raw_prompt": [[{"role": "user", "content": text}] for text in asked],
            "index": list(range(len(asked))),
            "data_source": ["golden"] * len(asked),
            "reward_model": [
                {"style": "rule", "ground_truth": question["answer"]} for question in content["questions"]
            ],
        },
        {"global_steps": step},
    )


METRICS = ("actor/loss", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "gcpo/kl_loss", "gcpo/grad_norm/")
"""Losses and gradient norms; a name that ends in a slash stands for all that begin with it."""


def _step(trainer: Any, queue: Any) -> dict[str, Any]:
    batch, metrics = queue.meta(queue.finished_rows(), "train"), {}
    batch = trainer._balance_batch(batch, metrics)
    for stage in ("_compute_old_log_prob", "_compute_ref_log_prob", "_compute_advantage"):
        batch = getattr(trainer, stage)(batch, metrics)
    weight = getattr(trainer._credit, "weight", None)
    upsilon = {} if weight is None else dict(zip(batch.keys, weight.tolist(), strict=True))
    batch = trainer._update_actor(batch, metrics)
    rows = {}
    for key in sorted(queue.fields["train"]):
        fields = queue.fields["train"][key]
        if key not in batch.keys or not key.startswith("step"):
            continue
        advantage = fields["advantages"].tolist()
        row = {
            # One number where all tokens have the same.
            "advantage": advantage[0] if len(set(advantage)) == 1 else advantage,
            "old_log_prob": _summary(fields["old_log_probs"]),
        }
        if key in upsilon:
            row["upsilon"] = upsilon[key]
        if "gcpo_log_ref" in fields and fields["gcpo_kl_mask"].any():
            row["log_ref"] = fields["gcpo_log_ref"].tolist()
        rows[key.split("-", 1)[1]] = row
    return {
        "rows": rows,
        "metrics": {
            name: float(value)
            for name, value in sorted(metrics.items())
            if any(name == known or known.endswith("/") and name.startswith(known) for known in METRICS)
        },
    }


def _summary(tensor: torch.Tensor) -> dict[str, Any]:
    """The sum and norm of a tensor, and a digest of its bytes."""
    data = tensor.detach().float().contiguous()
    return {
        "sum": float(data.double().sum()),
        "norm": float(data.double().norm()),
        "sha256": hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16],
    }
