"""Models: a folder, a name on the hub, or a checkpoint of a run, which verl's merger makes a folder of.

A checkpoint holds the shards of FSDP's ranks. It is merged once, into a folder beside it that appears only when it is
whole. verl's merger writes bfloat16, which is also what vLLM samples with on a GPU.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcpo.checkpoints import unreadable
from gcpo.files import lock, put_in_place, why
from gcpo.tools.evaluate import EvaluationError

MERGED = "merged"
_SHARDS_FILE = "gcpo_shards.json"
"""Beside the merged weights: what they were made of."""
_PIECE = 2**20


@dataclass(frozen=True)
class Model:
    """A model that vLLM can load.

    Attributes:
        name: how the run is called if the user doesn't say.
        path: a folder, or a name on the hub.
        digest: of the weights, so that a run doesn't go on with other ones; ``None`` for the hub.
    """

    name: str
    path: str
    digest: str | None


def find_model(text: str, say: Callable[[str], None] = print) -> Model:
    """The model that ``text`` means; a checkpoint is merged first.

    Args:
        text: a model's folder, a checkpoint (``global_step_N``, or ``actor`` in it), or a name on the hub.
        say: told what takes time.

    Raises:
        EvaluationError: it is none of these, or not whole.
    """
    path = Path(text).expanduser()
    if not path.exists():
        if text.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
            raise EvaluationError(f"there is no folder {text}; give a model, a checkpoint, or a name on the hub")
        return Model(text.rpartition("/")[2], text, None)
    if path.is_file():
        raise EvaluationError(f"{text} is a file; give the folder of a model or a checkpoint")
    path = path.resolve()
    if (path / "config.json").is_file():
        return Model(path.name, str(path), weights_digest(path))
    actor = path / "actor" if (path / "actor").is_dir() else path
    if not (actor / "fsdp_config.json").is_file():
        step = next(iter(sorted(path.glob("**/global_step_*/actor"))), None)
        hint = f"; it holds checkpoints, for example {step.parent}" if step else ""
        raise EvaluationError(
            f"{path} is no model (no config.json) and no FSDP checkpoint (no actor/fsdp_config.json){hint}"
        )
    merged = merge(actor, say)
    return Model(_checkpoint_name(actor), str(merged), weights_digest(merged))


def _checkpoint_name(actor: Path) -> str:
    """``quickstart-step-12`` for ``outputs/quickstart/checkpoints/global_step_12/actor``."""
    step = actor.parent if actor.name == "actor" else actor
    run = step.parent.parent if step.parent.name == "checkpoints" else step.parent
    return f"{run.name}-{step.name.removeprefix('global_').replace('_', '-')}"


def weights_digest(folder: Path) -> str:
    """A digest of a model's weight files: their names, sizes, first and last MiB. Training moves every weight.

    Raises:
        EvaluationError: there are none, one of several is missing, or one is cut off.
    """
    index = folder / "model.safetensors.index.json"
    try:
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise EvaluationError(f"{index} can't be read: {error}") from error
    files = [folder / name for name in sorted(named)] or sorted(folder.glob("*.safetensors"))
    files = files or sorted(folder.glob("*.bin"))
    if not files:
        raise EvaluationError(f"{folder} has a config.json and no weights (*.safetensors or *.bin)")
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            raise EvaluationError(f"{folder} is not whole: {file.name} is missing")
        if file.suffix == ".safetensors" and (problem := unreadable(file)):
            raise EvaluationError(f"{file} {problem}")
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_PIECE))
            stream.seek(max(0, size - _PIECE))
            digest.update(stream.read())
    return digest.hexdigest()


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def merge(actor: Path, say: Callable[[str], None] = print) -> Path:
    """The merged weights of the checkpoint in ``actor``; made by verl's merger if they aren't there yet.

    Evaluations of one checkpoint that are started together wait for the first one's merge.

    Raises:
        EvaluationError: the checkpoint is not whole, or verl can't merge it; nothing is left behind then.
    """
    shards = _shards(actor)
    target = actor.parent / MERGED if actor.name == "actor" else actor.with_name(f"{actor.name}-{MERGED}")
    if _made_of(target) == shards:
        return target  # also where nothing may be written
    try:
        with lock(target, lambda: say(f"another process makes {target}; waiting")):
            if _made_of(target) != shards:
                _merge_into(target, actor, shards, say)
    except OSError as error:
        raise EvaluationError(f"{target} can't be written: {why(error)}") from error
    return target


def _merge_into(target: Path, actor: Path, shards: dict[str, list[int]], say: Callable[[str], None]) -> None:
    if target.exists() and _made_of(target) is None:
        raise EvaluationError(f"{target} is in the way and was not made here; move it")
    say(f"merging {actor} into {target} with verl's merger")
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a merge that was killed
    try:
        unfinished.mkdir()
        _run_merger(actor, unfinished)
        (unfinished / _SHARDS_FILE).write_text(json.dumps(shards, indent=1) + "\n")
        put_in_place(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _shards(actor: Path) -> dict[str, list[int]]:
    """Size in bytes and time in ns of every shard."""
    config = actor / "fsdp_config.json"
    try:
        world = int(json.loads(config.read_text())["world_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{config} can't be read, so {actor} is no FSDP checkpoint: {error!r}") from error
    names = [f"model_world_size_{world}_rank_{rank}.pt" for rank in range(world)]
    for name in ("huggingface/config.json", *names):
        if not (actor / name).is_file():
            raise EvaluationError(f"the checkpoint {actor} is not whole: {name} is missing")
    states = {name: (actor / name).stat() for name in names}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}


def _made_of(target: Path) -> Any:
    try:
        return json.loads((target / _SHARDS_FILE).read_text())
    except (OSError, ValueError):
        return None


def _run_merger(actor: Path, target: Path) -> None:
    """In a process of its own: verl starts with seconds of imports, and holds the whole model in memory."""
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    command += ["--local_dir", str(actor), "--target_dir", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it says nothing"]
        raise EvaluationError(f"verl's merger can't read the checkpoint {actor}: {lines[-1]}")
