"""Two runs on one machine send new weights through different sockets."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from gcpo import weight_socket
from gcpo.adapters import hooks
from gcpo.adapters.worker import MethodWorker
from gcpo.cpu import patches
from tests.run_inputs import composed

JOB = "01000000"
"""Of every Ray cluster's first job."""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (weight_socket.CLUSTER_VARIABLE, weight_socket.JOB_VARIABLE, "VLLM_PLUGINS", "VERL_REPLICA_RANK"):
        monkeypatch.delenv(name, raising=False)


def in_cluster(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    context = SimpleNamespace(gcs_address=address, get_job_id=lambda: JOB)
    monkeypatch.setattr(ray, "is_initialized", lambda: address is not None)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)


def sender(monkeypatch: pytest.MonkeyPatch, address: str) -> str:
    """The name that a worker sends to, after verl's set-up of the rollout."""
    in_cluster(monkeypatch, address)
    handle = f"ipc:///tmp/rl-colocate-zmq-{JOB}-replica-0-rank-0.sock"

    def set_up(self: Any) -> None:
        self.rollout = SimpleNamespace(zmq_handle=handle)

    monkeypatch.setattr(ActorRolloutRefWorker, "init_model", set_up)
    config = composed("gcpo_quickstart")
    hooks.send_to_workers(hooks.make_method(config), config)
    worker = MethodWorker.__new__(MethodWorker)
    worker.config, worker._is_actor, worker.actor, worker.ref = config.actor_rollout_ref, False, None, None
    worker.init_model()
    return worker.rollout.zmq_handle


def receiver(monkeypatch: pytest.MonkeyPatch, address: str) -> str:
    """The name at which vLLM's worker, no Ray process, waits: verl's own code with what its parents left it."""
    in_cluster(monkeypatch, address)
    weight_socket.cluster_token()  # when the server's process imports verl
    monkeypatch.setenv(weight_socket.JOB_VARIABLE, JOB)  # by verl's server
    in_cluster(monkeypatch, None)
    for _ in range(3):  # the engine, its core, its worker
        patches.apply_in_vllm()
    worker = SimpleNamespace(local_rank=0, model_runner=SimpleNamespace())
    return vLLMColocateWorkerExtension._get_zmq_handle(worker)


def test_sender_and_receiver_agree_and_runs_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for address in ("10.0.0.1:6379", "10.0.0.1:6380"):
        name = sender(monkeypatch, address)
        assert name == receiver(monkeypatch, address) and JOB in name
        names.add(name)
    assert len(names) == 2


def test_without_our_plug_in_in_vllm_both_keep_verls_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    name = sender(monkeypatch, "10.0.0.1:6379")
    assert name == f"ipc:///tmp/rl-colocate-zmq-{JOB}-replica-0-rank-0.sock" == receiver(monkeypatch, "10.0.0.1:6379")
    monkeypatch.setenv("VLLM_PLUGINS", f"other,{weight_socket.PLUGIN}")
    assert sender(monkeypatch, "10.0.0.1:6379") != name


def test_a_name_of_another_form_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="without the number 02000000 of the Ray job"):
        weight_socket.own_socket(f"ipc:///tmp/rl-colocate-zmq-{JOB}-replica-0-rank-0.sock", "02000000", "abcd")


def test_a_vllm_that_is_not_verls_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    patches.apply_in_vllm()
    assert weight_socket.JOB_VARIABLE not in os.environ and "gcpo.plugin" in sys.modules
