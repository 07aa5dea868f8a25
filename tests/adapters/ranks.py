"""What the ranks of the engine tests run: our worker over FSDP2 on gloo, in processes without Ray.

Processes are forked from one server that has imported verl, because that import takes seconds.
"""

from __future__ import annotations

import copy
import io
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.multiprocessing as mp
from tensordict import TensorDict


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _entry(rank: int, world: int, port: int, work: Callable[..., Any], args: tuple, queue: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        import gcpo.adapters  # noqa: F401  (loads verl and its plug-ins)

        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
        # As bytes: a tensor in a queue is a handle that dies with its process.
        stream = io.BytesIO()
        torch.save(work(rank, world, *args), stream)
        queue.put((rank, "ok", stream.getvalue()))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        queue.put((rank, "error", traceback.format_exc()))
        raise


def run_on_ranks(world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """``work(rank, world, *args)`` on every rank; what each returned.

    A rank that raises fails the test with its traceback.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["gcpo.adapters.engine", "gcpo.adapters.worker"])
    queue, port = context.Queue(), free_port()
    processes = [context.Process(target=_entry, args=(r, world, port, work, args, queue)) for r in range(world)]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < world:
            rank, status, value = queue.get(timeout=300)
            assert status == "ok", f"rank {rank}:\n{value}"
            found[rank] = torch.load(io.BytesIO(value), weights_only=False)
    finally:
        for process in processes:
            process.join(timeout=20 if len(found) == world else 1)
            if process.is_alive():
                process.terminate()
    return [found[rank] for rank in range(world)]


# ---- on a rank ----------------------------------------------------------------------------------------------------


def build_worker(config: Any, role: str = "actor", *, lr: float = 0.0, engine_class: type | None = None) -> Any:
    """Our worker as Ray would hold it, from the configuration of a run; gradients are not clipped.

    Args:
        config: a whole configuration; ``actor_rollout_ref`` of a copy is used, as every worker is given one.
        role: "actor" or "ref".
        lr: constant learning rate.
        engine_class: an engine in the place of the one that verl's registry has for this device.
    """
    from omegaconf import open_dict

    from gcpo.adapters import hooks
    from gcpo.adapters.worker import MethodWorker

    config = copy.deepcopy(config)
    hooks.send_to_workers(hooks.make_method(config), config)
    config = config.actor_rollout_ref
    with open_dict(config):
        config.actor.optim.update({"lr": lr, "weight_decay": 0.0, "clip_grad": 1e9, "total_training_steps": 10})
        config.actor.optim.lr_warmup_steps = 0
    worker = MethodWorker(config, role=role)
    worker.init_model()
    if engine_class is not None:
        inner = worker.actor
        inner.engine = engine_class(
            inner.model_config, inner.engine_config, inner.optimizer_config, inner.checkpoint_config
        )
        inner.reset()
    return worker


def build_engine(model: str, **options: Any) -> Any:
    """The engine by itself; see `gcpo.adapters.standalone.standalone_engine` for the options."""
    from gcpo.adapters.standalone import standalone_engine

    return standalone_engine(model, **options)


def with_changes(config: Any, changes: dict[str, Any]) -> Any:
    """A copy in which keys of ``actor_rollout_ref`` have other values."""
    from omegaconf import OmegaConf

    config = copy.deepcopy(config)
    for key, value in changes.items():
        OmegaConf.update(config.actor_rollout_ref, key, value, force_add=True)
    return config


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor that may be sharded, whole."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter, whole, by name."""
    return {name: full(p.detach()) for name, p in engine.module.named_parameters()}


@contextmanager
def recorded_gradients(engine: Any) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The whole gradients that every optimizer step inside is given."""
    steps: list[dict[str, torch.Tensor]] = []
    original = engine.optimizer_step

    def optimizer_step() -> float:
        steps.append({n: full(p.grad) for n, p in engine.module.named_parameters() if p.grad is not None})
        return original()

    engine.optimizer_step = optimizer_step
    try:
        yield steps
    finally:
        engine.optimizer_step = original


def pack(rows: list[dict[str, torch.Tensor]], **non_tensor: Any) -> TensorDict:
    """Rows of 1-D tensors as the batch that a worker gets out of TransferQueue."""
    from verl.utils import tensordict_utils as tu

    from gcpo.adapters.schema import nested

    batch = TensorDict({name: nested([row[name] for row in rows]) for name in rows[0]}, batch_size=len(rows))
    tu.assign_non_tensor(batch, **non_tensor)
    return batch
