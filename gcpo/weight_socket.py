"""A socket for new weights that no other run on this machine uses.

verl sends weights to vLLM through a socket in ``/tmp`` whose name has the number of the Ray job. Every run with a Ray
of its own is job 1, so two runs on one machine have the same name: one run's vLLM could be given the other's weights.
Here the name also has a token of the Ray cluster. Sender and receiver compute it from the cluster's address.
"""

from __future__ import annotations

import hashlib
import os
import sys

CLUSTER_VARIABLE = "GCPO_RAY_CLUSTER"
"""Hands the token to vLLM's processes, which are no Ray processes."""
JOB_VARIABLE = "VERL_RAY_JOB_ID"
"""verl's: vLLM's worker puts it into the name of the socket."""
PLUGIN = "gcpo_cpu"
"""Our entry point in ``vllm.general_plugins``."""


def cluster_token() -> str | None:
    """Eight characters that stand for the Ray cluster of this process, None where it is in none.

    Also None where ``VLLM_PLUGINS`` leaves our plug-in out: vLLM would then wait at verl's own name.
    """
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and PLUGIN not in plugins.split(","):
        return None
    ray = sys.modules.get("ray")  # not imported here: vLLM's own processes have no use for it
    if ray is not None and ray.is_initialized():
        address = ray.get_runtime_context().gcs_address
        os.environ[CLUSTER_VARIABLE] = hashlib.sha256(address.encode()).hexdigest()[:8]
    return os.environ.get(CLUSTER_VARIABLE)


def receive_on_own_socket() -> None:
    """In a vLLM process: extend the number of the Ray job, once, by the token."""
    token, job = cluster_token(), os.environ.get(JOB_VARIABLE)
    if token and job and not job.endswith(f"-{token}"):
        os.environ[JOB_VARIABLE] = f"{job}-{token}"


def own_socket(handle: str, job: str, token: str) -> str:
    """The name of verl's socket with the token after the number of the Ray job.

    Raises:
        RuntimeError: the name has another form, so that vLLM would wait at another one.
    """
    before, found, after = handle.partition(f"-zmq-{job}-")
    if not found:
        raise RuntimeError(f"verl names the socket for new weights {handle}, without the number {job} of the Ray job")
    return f"{before}-zmq-{job}-{token}-{after}"
