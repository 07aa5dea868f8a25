"""A socket for new weights that is unique to the run on this machine.

verl sends weights to vLLM through a socket in ``/tmp`` named after the number of the Ray job. A run with its own Ray
cluster is always job 1, so two runs on one machine share the name: one run's vLLM could receive the other's weights.
This module adds a token of the Ray cluster. Sender and receiver compute it from the cluster's address.
"""

from __future__ import annotations

import hashlib
import os
import sys

CLUSTER_VARIABLE = "GCPO_RAY_CLUSTER"
"""Passes the token to vLLM's processes, which are not Ray processes."""
JOB_VARIABLE = "VERL_RAY_JOB_ID"
"""verl's variable, which vLLM's worker puts into the name of the socket."""
PLUGIN = "gcpo_cpu"
"""Our entry point in ``vllm.general_plugins``."""


def cluster_token() -> str | None:
    """Return eight characters that identify the Ray cluster of this process, or None outside a cluster.

    Also None if ``VLLM_PLUGINS`` excludes our plug-in, because vLLM would then use verl's name.
    """
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and PLUGIN not in plugins.split(","):
        return None
    ray = sys.modules.get("ray")  # not imported here: vLLM's processes do not need it
    if ray is not None and ray.is_initialized():
        address = ray.get_runtime_context().gcs_address
        os.environ[CLUSTER_VARIABLE] = hashlib.sha256(address.encode()).hexdigest()[:8]
    return os.environ.get(CLUSTER_VARIABLE)


def receive_on_own_socket() -> None:
    """Append the token to the number of the Ray job, once per vLLM process."""
    token, job = cluster_token(), os.environ.get(JOB_VARIABLE)
    if token and job and not job.endswith(f"-{token}"):
        os.environ[JOB_VARIABLE] = f"{job}-{token}"


def own_socket(handle: str, job: str, token: str) -> str:
    """Return the name of verl's socket with the token after the number of the Ray job.

    Raises:
        RuntimeError: the name has another form, so that vLLM would use another name.
    """
    before, found, after = handle.partition(f"-zmq-{job}-")
    if not found:
        raise RuntimeError(f"verl names the socket for new weights {handle}, without the number {job} of the Ray job")
    return f"{before}-zmq-{job}-{token}-{after}"
