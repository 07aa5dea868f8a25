"""Everything of verl and TransferQueue that gcpo uses is there, with the shape that it relies on."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gcpo.adapters  # noqa: F401  (loads verl and its plug-ins)

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "gcpo").rglob("*.py"), *(ROOT / "recipe").rglob("*.py")]


def imported() -> list[tuple[str, str]]:
    """Every name that our sources import from verl or transfer_queue, and every ``tq.`` attribute."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.split(".")[0] in ("verl", "transfer_queue"):
                found |= {(node.module, alias.name) for alias in node.names}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tq":
                found.add(("transfer_queue", node.attr))
    return sorted(found)


@pytest.mark.parametrize(("module", "name"), imported(), ids=lambda value: str(value))
def test_symbol_exists(module: str, name: str) -> None:
    """A name that verl renames fails here and not in the middle of a run."""
    loaded = importlib.import_module(module)
    assert hasattr(loaded, name) or importlib.import_module(f"{module}.{name}")


def overridden() -> list[tuple[type, str]]:
    """Methods that our subclasses of verl's classes override."""
    from gcpo.adapters.dataset import EpisodePromptDataset
    from gcpo.adapters.dump import DumpingTrainer
    from gcpo.adapters.engine import GCPOFSDPEngine
    from gcpo.adapters.group_client import GroupClient
    from gcpo.adapters.mini_batches import MethodTrainingWorker
    from gcpo.adapters.rollout import GCPOAgentLoopWorkerPlain
    from gcpo.adapters.trainer import MethodTrainer, OwnFieldsTrainer
    from gcpo.adapters.worker import MethodWorker

    names = {
        GCPOFSDPEngine: ["prepare_model_inputs", "prepare_model_outputs", "forward_backward_batch", "train_batch"],
        GCPOAgentLoopWorkerPlain: ["_run_agent_loop", "_run_prompt", "_compute_score", "_agent_loop_postprocess"],
        GroupClient: ["_acquire_server", "_release_server"],
        MethodWorker: ["init_model"],
        MethodTrainingWorker: ["train_mini_batch", "train_batch"],
        EpisodePromptDataset: ["maybe_filter_out_long_prompts"],
        DumpingTrainer: ["_log_rollout_data", "_dump_generations"],
        OwnFieldsTrainer: ["_compute_ref_log_prob", "_compute_values", "_update_critic"],
        MethodTrainer: [
            "_setup",
            "_init_resource_pool_mgr",
            "_build_replay_buffer",
            "on_train_begin",
            "_balance_batch",
            "_compute_old_log_prob",
            "_compute_advantage",
            "_update_actor",
        ],
    }
    return [(cls, name) for cls, methods in names.items() for name in methods]


@pytest.mark.parametrize(("cls", "name"), overridden(), ids=lambda value: getattr(value, "__name__", value))
def test_overridden_methods_take_what_the_parent_takes(cls: type, name: str) -> None:
    """The parent has the method, and its parameters can be passed to ours by name or position."""
    assert name in vars(cls)
    parent = next(base for base in cls.__mro__[1:] if name in vars(base))
    theirs = [p for p in inspect.signature(vars(parent)[name]).parameters.values()]
    ours = inspect.signature(vars(cls)[name]).parameters
    takes_any = {p.kind for p in ours.values()} & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    for parameter in theirs:
        assert parameter.name in ours or takes_any, f"{parent.__name__}.{name} has {parameter.name}"


def test_plug_in_is_registered() -> None:
    """Importing verl is enough: estimator, policy loss, trainer mode, engine and entry points."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
    from verl.trainer.ppo.v1 import get_trainer_cls
    from verl.workers.engine import EngineRegistry

    for name in ("gcpo", "gc2po"):
        assert get_adv_estimator_fn(name).__name__ == "method_advantage"
        assert get_trainer_cls(name).__name__ == "MethodTrainer"
    assert get_policy_loss_fn("gcpo") is get_policy_loss_fn("vanilla")
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__ == "GCPOFSDPEngine"
    assert {e.value for e in entry_points(group="verl.plugins") if e.name == "gcpo"} == {"gcpo.plugin"}
    assert {e.value for e in entry_points(group="vllm.general_plugins")} >= {"gcpo.cpu.patches:apply_in_vllm"}


def test_head_sizes_of_vllm_on_the_cpu() -> None:
    """A model with other heads is refused before the engine starts."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from gcpo.checks.model import CPU_HEAD_SIZES

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()


def test_ray_actor_class_can_be_unwrapped() -> None:
    """AgentLoopWorkerTQ is a Ray actor class; its plain class is what we subclass."""
    from verl.experimental.agent_loop import AgentLoopWorker
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

    assert issubclass(AgentLoopWorkerTQ.__ray_metadata__.modified_class, AgentLoopWorker)


def test_the_trainer_answers_sync() -> None:
    """verl compares ``trainer_mode`` with "sync" to choose its buffer and its checkpoints."""
    from verl.trainer.ppo.v1 import trainer_base

    from gcpo.adapters.trainer import MethodTrainer

    assert 'self.trainer_mode == "sync"' in inspect.getsource(trainer_base.PPOTrainer)
    for mode in ("gcpo", "gc2po"):
        trainer = object.__new__(MethodTrainer)
        trainer.method = SimpleNamespace(name=mode)
        trainer.trainer_mode = mode
        assert trainer.trainer_mode == "sync"
        with pytest.raises(ValueError, match=f"the mode {mode}, not 'sync'"):
            trainer.trainer_mode = "sync"


def test_estimator_is_verls_grpo_bit_for_bit() -> None:
    """With Upsilon = 1, or none, B equals verl's GRPO advantage exactly; else it is A times Upsilon, group by group."""
    import numpy as np
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    from gcpo.adapters.registry import credited, method_advantage
    from gcpo.methods.gcpo.credit import CausalCredit

    def credit(weight: torch.Tensor, form: str = "product") -> CausalCredit:
        return CausalCredit(weight, torch.ones(12, dtype=torch.bool), form)

    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(12, 5, generator=generator) < 0.8).long()
    mask[:, 0], mask[3] = 1, 0
    rewards = torch.rand(12, 5, generator=generator) * mask
    index = np.array(["a", "b", "c"] * 4, dtype=object)
    wanted, _ = compute_grpo_outcome_advantage(rewards.clone(), mask, index)
    for given in (None, credit(torch.ones(12))):
        with credited(given):
            found, returns = method_advantage(rewards.clone(), mask, index)
        assert torch.equal(found, wanted) and torch.equal(found, returns)
    upsilon = torch.rand(12, generator=generator) * 2
    with credited(credit(upsilon)):
        weighted, _ = method_advantage(rewards.clone(), mask, index)
    torch.testing.assert_close(weighted, wanted * upsilon[:, None])
    with credited(credit(upsilon, "signed")):
        signed, _ = method_advantage(rewards.clone(), mask, index)
    mean = torch.stack([upsilon[i % 3 :: 3].mean() for i in range(12)])
    torch.testing.assert_close(signed, wanted * (1 + wanted.sign() * (upsilon - mean)[:, None]))


def test_estimator_outside_our_trainer_is_refused() -> None:
    """Nothing else computes Upsilon, so the estimator does not fall back to GRPO silently."""
    import numpy as np

    from gcpo.adapters.registry import method_advantage

    with pytest.raises(RuntimeError, match="trainer.v1.trainer_mode=gcpo"):
        method_advantage(torch.ones(2, 1), torch.ones(2, 1), np.array(["a", "a"], dtype=object))


def test_policy_loss_is_vanilla() -> None:
    """The surrogate is verl's own function on the same arguments."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig

    config = FSDPActorConfig(strategy="fsdp2", rollout_n=4, use_dynamic_bsz=True)
    generator = torch.Generator().manual_seed(0)
    old, new, advantages = (torch.randn(3, 4, generator=generator) for _ in range(3))
    arguments = (old, new, advantages, torch.ones(3, 4), "token-mean", config)
    ours, verls = get_policy_loss_fn("gcpo")(*arguments), get_policy_loss_fn("vanilla")(*arguments)
    assert torch.equal(ours[0], verls[0]) and ours[1] == verls[1]


def test_verl_s_loss_without_a_ratio() -> None:
    """What GVPO needs of ``gpg`` and ``seq-mean-token-sum``: the sum of -A * log pi over all tokens, over B * n."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig

    config = FSDPActorConfig(strategy="fsdp2", rollout_n=4, use_dynamic_bsz=True)
    config.global_batch_info.update({"dp_size": 1, "batch_num_tokens": 99, "global_batch_size": 8})
    generator = torch.Generator().manual_seed(0)
    old, new, advantages = (torch.randn(3, 4, generator=generator) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    loss, _ = get_policy_loss_fn("gpg")(old, new, advantages, mask, "seq-mean-token-sum", config)
    torch.testing.assert_close(loss, -(new * advantages * mask).sum() / 8)


def test_the_actor_is_trained_by_the_class_that_is_named() -> None:
    """verl makes the actor of ``actor_worker_cls``, and its update calls ``train_batch`` for every mini-batch."""
    from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

    from gcpo.adapters.mini_batches import MethodTrainingWorker
    from gcpo.adapters.worker import MethodWorker

    assert ActorRolloutRefWorker.actor_worker_cls is TrainingWorker
    assert MethodWorker.actor_worker_cls is MethodTrainingWorker and MethodWorker.ref_worker_cls is TrainingWorker
    assert "self.train_batch(mini_batch_td)" in inspect.getsource(TrainingWorker.train_mini_batch)


def test_names_in_the_checks_are_verl_s() -> None:
    """The checks of a run list verl's names, so that they need not import verl."""
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, kl_penalty
    from verl.utils.tracking import Tracking

    from gcpo.checks import values

    actor = "actor_rollout_ref.actor"
    # `bypass_mode` belongs to a rollout correction that is refused.
    assert set(values.CHOICES[f"{actor}.policy_loss.loss_mode"]) == set(POLICY_LOSS_REGISTRY) - {"bypass_mode"}
    for mode in values.CHOICES[f"{actor}.loss_agg_mode"]:
        agg_loss(torch.ones(1, 1), torch.ones(1, 1), mode, batch_num_tokens=1, global_batch_size=1)
    for kind in values.CHOICES[f"{actor}.kl_loss_type"]:
        kl_penalty(torch.zeros(1), torch.zeros(1), kind)
    assert set(values.LOGGERS) == {*Tracking.supported_backend, "tracking"}
    for name in values.REWARD_MANAGERS:
        get_reward_manager_cls(name)
    for number in ("lr", "weight_decay", "clip_grad", "lr_warmup_steps", "lr_warmup_steps_ratio", "min_lr_ratio"):
        assert f"{actor}.optim.{number}" in values.NUMBERS


def test_checked_settings_exist() -> None:
    """A key that is misspelt in the checks, or that verl renames, would check nothing."""
    from omegaconf import OmegaConf

    from gcpo.checks import supported, values
    from gcpo.checks.overrides import dotted_keys
    from tests.run_inputs import composed

    known = set(dotted_keys(composed("gcpo_trainer", "device=cpu"))) | set(dotted_keys(composed("verl")))
    checked = {*values.NUMBERS, *values.CHOICES, *values.SWITCHES, *supported.REFUSED, *supported.LEGACY}
    assert checked <= known
    assert OmegaConf.select(composed("gcpo_trainer"), "trainer.v1.trainer_mode") == "gcpo"


def test_the_page_on_verl_s_settings() -> None:
    """docs/verl_settings.md names settings that exist, and every one that is refused by name."""
    from gcpo.checks import supported
    from gcpo.checks.overrides import dotted_keys
    from tests.run_inputs import composed

    text = (ROOT / "docs" / "verl_settings.md").read_text()
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    verdicts = {key: verdict.strip() for keys, verdict in rows for key in re.findall(r"`([^`]+)`", keys)}
    assert verdicts.keys() <= set(dotted_keys(composed("verl")))
    for key in (*supported.REFUSED, *supported.LEGACY):
        assert verdicts[key].startswith("refused"), key
    assert all(re.match("works|made right|refused|no effect", verdict) for verdict in verdicts.values())


def test_the_loss_depends_on_the_micro_batch_without_a_scale() -> None:
    """Why seq-mean-token-sum-norm needs loss_scale_factor: verl divides by the width of what it is given."""
    from verl.trainer.ppo.core_algos import agg_loss

    def loss(width: int, scale: int | None) -> float:
        mask = torch.zeros(1, width)
        mask[0, :2] = 1
        return float(
            agg_loss(
                torch.ones(1, width), mask, "seq-mean-token-sum-norm", global_batch_size=1, loss_scale_factor=scale
            )
        )

    assert loss(2, None) != loss(8, None)
    assert loss(2, 64) == loss(8, 64)


def test_verl_s_clip_ratio_is_not_read_beside_its_bounds() -> None:
    """Why actor.clip_ratio by itself is refused."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig

    old, new = torch.zeros(1, 1), torch.ones(1, 1)
    arguments = (old, new, torch.ones(1, 1), torch.ones(1, 1), "token-mean")
    losses = [
        get_policy_loss_fn("vanilla")(
            *arguments, FSDPActorConfig(strategy="fsdp2", rollout_n=4, use_dynamic_bsz=True, clip_ratio=ratio)
        )[0]
        for ratio in (0.2, 0.5)
    ]
    assert torch.equal(*losses)


def test_verl_s_rejection_changes_the_response_mask() -> None:
    """Why rollout_rs is refused: the mask loses tokens after the causal stage has read it."""
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

    old = torch.zeros(1, 3)
    rollout = torch.tensor([[0.0, -3.0, 0.0]])
    mask = torch.ones(1, 3)
    _, changed, _ = compute_rollout_correction_and_rejection_mask(
        old, rollout, mask, rollout_is=None, rollout_rs="token_k1", rollout_rs_threshold="0.5_2.0"
    )
    assert changed.sum() < mask.sum()
