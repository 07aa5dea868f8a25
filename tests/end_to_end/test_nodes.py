"""A step on a Ray cluster of two raylets, each with one rank and one vLLM server, beside the same step on one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.test_training import our_yaml, train

SAME = (
    "critic/score/mean",
    "response_length/mean",
    "actor/pg_loss",
    "actor/grad_norm",
    "gcpo/upsilon/mean",
    "gcpo/kl_loss",
    "gcpo/tokens/generated/leave_one_out",
    "gcpo/tokens/scored",
    "gcpo/balance/whole_groups",
)
"""Metrics that do not depend on where the processes run."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster of two raylets."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # processes inherit the environment of their raylet
    machine = {"num_cpus": 8, "num_gpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
    try:
        cluster.add_node(**machine)
        yield cluster.address
    finally:
        cluster.shutdown()


def step(inputs: Path, output: Path, *overrides: str) -> tuple[dict, str]:
    settings = [
        "gcpo.preset=balanced",
        "gcpo.features.source=response",
        "actor_rollout_ref.rollout.agent.num_workers=2",
        "algorithm.rollout_correction.bypass_mode=True",
        "trainer.total_training_steps=1",
        *overrides,
    ]
    (found,), log = train("recipe.gcpo.main_gcpo", inputs, output, "step", *our_yaml(*settings))
    return found, log


def test_two_raylets_run_what_one_does(inputs: Path, tmp_path: Path, cluster: str) -> None:
    """Two FSDP ranks and two vLLM servers, whose log-probabilities are the old ones."""
    environment = "ray_kwargs.ray_init.runtime_env.env_vars"
    two, log = step(
        inputs,
        tmp_path / "two",
        f"ray_kwargs.ray_init.address={cluster}",
        "ray_kwargs.ray_init.num_cpus=null",
        "ray_kwargs.ray_init.num_gpus=null",
        f"+{environment}.VERL_FILE_LOGGER_PATH={tmp_path}/two/step.jsonl",
        f"+{environment}.TENSORBOARD_DIR={tmp_path}/two/tensorboard",
        "trainer.nnodes=2",
    )
    assert f"Connecting to existing Ray cluster at address: {cluster}" in log
    one, _ = step(inputs, tmp_path / "one", "trainer.n_gpus_per_node=2")
    assert two["actor/grad_norm"] > 0 and two["gcpo/tokens/generated/leave_one_out"] > 0
    assert "actor/entropy" not in two  # no pass of the actor for the old log-probabilities
    assert {name: two[name] for name in SAME} == pytest.approx({name: one[name] for name in SAME}, rel=1e-4)
