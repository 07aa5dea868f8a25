"""Checks of the batch sizes and the devices."""

from __future__ import annotations

import os
import sys
from math import prod

from omegaconf import DictConfig

from gcpo.reading import ACTOR, ROLLOUT, get
from gcpo.settings import ConfigError

CPUS_PER_RANK = 3
"""Number of Ray's CPUs that verl reserves for every device of its pool."""


def check_batches(config: DictConfig) -> None:
    """Check that the mini-batch divides the batch, and that the batch divides over the devices.

    Raises:
        ConfigError: it does not; verl would pad the batch, or stop in the update.
    """
    batch, mini, n = (get(config, key) for key in ("data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size",
                                                   f"{ROLLOUT}.n"))  # fmt: skip
    if mini > batch:
        raise ConfigError(
            f"{ACTOR}.ppo_mini_batch_size is {mini} and data.train_batch_size is {batch}: a mini-batch cannot be "
            f"larger than the batch; set {ACTOR}.ppo_mini_batch_size={batch}"
        )
    if batch % mini:
        raise ConfigError(
            f"{ACTOR}.ppo_mini_batch_size is {mini} and does not divide data.train_batch_size ({batch}); set "
            f"{ACTOR}.ppo_mini_batch_size={max(d for d in range(1, mini + 1) if not batch % d)}, or another divisor"
        )
    chunk = get(config, "data.gen_batch_size")
    if chunk is not None and batch % chunk:
        raise ConfigError(
            f"data.gen_batch_size is {chunk} and does not divide data.train_batch_size ({batch}); set "
            "data.gen_batch_size=null"
        )
    ranks = get(config, "trainer.n_gpus_per_node") * get(config, "trainer.nnodes")
    if mini * n % ranks:
        raise ConfigError(
            f"a mini-batch has {mini} questions with {n} responses each, {mini * n} rows, which do not divide over "
            f"{ranks} devices (trainer.n_gpus_per_node, trainer.nnodes): change {ACTOR}.ppo_mini_batch_size"
        )


def check_devices(config: DictConfig) -> None:
    """Check that a rollout engine fits on the devices, and that a single machine has them.

    Raises:
        ConfigError: there are fewer devices than the settings need.
    """
    gpus, nodes = get(config, "trainer.n_gpus_per_node"), get(config, "trainer.nnodes")
    sizes = {f"{ROLLOUT}.{name}": get(config, f"{ROLLOUT}.{name}", 1)
             for name in ("tensor_model_parallel_size", "data_parallel_size")}  # fmt: skip
    engine = prod(sizes.values())
    if gpus * nodes % engine:
        larger = [key for key, size in sizes.items() if size > 1]
        raise ConfigError(
            f"a rollout engine takes {engine} devices ({', '.join(f'{key} is {sizes[key]}' for key in larger)}), which "
            f"does not divide the {gpus * nodes} of the run (trainer.n_gpus_per_node is {gpus}, trainer.nnodes is "
            f"{nodes}); set {' '.join(f'{key}=1' for key in larger)}"
        )
    executor = f"{ROLLOUT}.engine_kwargs.vllm.distributed_executor_backend"
    if engine > 1 and get(config, executor, None) == "uni":
        raise ConfigError(
            f"{executor}=uni runs a model on one device, and a rollout engine takes {engine} here; set {executor}=mp"
        )
    ray = sys.modules.get("ray")
    running = ray is not None and ray.is_initialized()
    if not running and _joins_cluster(config):
        _check_numbers(config)
    # Only Ray can count the devices of its cluster, and verl asks it before it creates a worker. A process of Ray
    # without a GPU does not see those of its machine.
    if nodes > 1 or running or _joins_cluster(config):
        return
    if get(config, "trainer.device") == "cpu":
        _check_logical(config, gpus)
    elif get(config, "trainer.device") == "cuda":
        _check_gpus(gpus)


def _joins_cluster(config: DictConfig) -> bool:
    """Return whether the run joins a Ray cluster instead of starting one."""
    address = get(config, "ray_kwargs.ray_init.address") or os.environ.get("RAY_ADDRESS")
    return bool(address) and address != "local"


def _check_numbers(config: DictConfig) -> None:
    """Check that nobody tells a running cluster how many devices it has; Ray refuses that."""
    given = [name for name in ("num_cpus", "num_gpus") if get(config, f"ray_kwargs.ray_init.{name}") is not None]
    if given:
        raise ConfigError(
            f"the run joins a Ray cluster, which knows its devices, and ray_kwargs.ray_init.{given[0]} is given: set "
            f"{' '.join(f'ray_kwargs.ray_init.{name}=null' for name in given)}"
        )


def _check_logical(config: DictConfig, gpus: int) -> None:
    """Check the logical devices: on a CPU a device is a process, and the settings of Ray give their number."""
    logical, cpus = get(config, "ray_kwargs.ray_init.num_gpus", 0), get(config, "ray_kwargs.ray_init.num_cpus")
    if logical < gpus:
        raise ConfigError(
            f"trainer.n_gpus_per_node is {gpus} and Ray is told of {logical} devices: set "
            f"++ray_kwargs.ray_init.num_gpus={gpus}"
        )
    need = CPUS_PER_RANK * gpus + 1
    if cpus is not None and cpus < need:
        raise ConfigError(
            f"ray_kwargs.ray_init.num_cpus is {cpus}, and verl reserves {CPUS_PER_RANK} of them for each of the {gpus} "
            f"devices of trainer.n_gpus_per_node, and one more: set ray_kwargs.ray_init.num_cpus={need}"
        )


def _check_gpus(gpus: int) -> None:
    found = count_gpus()
    if found == 0:
        raise ConfigError(
            "trainer.device is cuda, and PyTorch finds no GPU on this machine: use a machine with GPUs, or our yaml "
            "with device=cpu"
        )
    if gpus > found:
        raise ConfigError(
            f"trainer.n_gpus_per_node is {gpus}, and PyTorch finds {found} on this machine: set "
            f"trainer.n_gpus_per_node={found}"
        )


def count_gpus() -> int:
    """Return the number of GPUs that PyTorch can use on this machine."""
    import torch

    return torch.cuda.device_count()
