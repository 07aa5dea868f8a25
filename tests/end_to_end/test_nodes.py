"""A step on a Ray cluster of two raylets, each with one rank and one vLLM server, beside the same step on one node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import FIRST
from tests.end_to_end.test_training import our_yaml, train

SAME = (
    "critic/score/mean",
    "response_length/mean",
    "actor/pg_loss",
    "actor/grad_norm",
    "gcpo/upsilon/mean",
    "gcpo/kl_loss",
    "gcpo/tokens/generated/collider",
    "gcpo/tokens/scored",
)
"""Metrics that do not depend on where the processes run."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster of two raylets."""
    from ray.cluster_utils import Cluster

    machine = {"num_cpus": 8, "num_gpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
    try:
        cluster.add_node(**machine)
        yield cluster.address
    finally:
        cluster.shutdown()


def test_two_raylets_run_what_one_does(
    inputs: Path, tmp_path: Path, cluster: str, first_run: tuple[Path, list[dict]]
) -> None:
    """Two FSDP ranks, two vLLM servers and two agent-loop workers give the metrics of one each."""
    environment = "ray_kwargs.ray_init.runtime_env.env_vars"
    (two,), log = train(
        "recipe.gcpo.main_gcpo",
        inputs,
        tmp_path,
        "step",
        *our_yaml(
            *FIRST,
            f"ray_kwargs.ray_init.address={cluster}",
            "ray_kwargs.ray_init.num_cpus=null",
            "ray_kwargs.ray_init.num_gpus=null",
            f"+{environment}.VERL_FILE_LOGGER_PATH={tmp_path}/step.jsonl",
            f"+{environment}.TENSORBOARD_DIR={tmp_path}/tensorboard",
            "actor_rollout_ref.rollout.agent.num_workers=2",
            "trainer.nnodes=2",
            "trainer.total_training_steps=1",
        ),
    )
    assert f"Connecting to existing Ray cluster at address: {cluster}" in log
    one = first_run[1][0]
    assert two["actor/grad_norm"] > 0 and two["gcpo/tokens/generated/collider"] > 0
    assert two["gcpo/balance/whole_groups"] == 1
    assert {name: two[name] for name in SAME} == pytest.approx({name: one[name] for name in SAME}, rel=1e-4)
