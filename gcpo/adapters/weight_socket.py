"""The actor worker that sends new weights through a socket of its own Ray cluster; see `gcpo.weight_socket`."""

from __future__ import annotations

import ray
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker

from gcpo.weight_socket import cluster_token, own_socket


class OwnSocketWorker(ActorRolloutRefWorker):
    """verl's actor worker, whose weights go to a socket of this Ray cluster."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """verl's set-up; then the sender's name gets the token."""
        super().init_model()
        token, handle = cluster_token(), getattr(self.rollout, "zmq_handle", None)
        if token and handle:
            self.rollout.zmq_handle = own_socket(handle, ray.get_runtime_context().get_job_id(), token)
