"""Complete checkpoints for verl's trainer: a manifest after each save, and the choice of a complete one at the start.

The driver decides for all ranks. With several machines, a task on each machine lists its files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from omegaconf import open_dict
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gcpo import checkpoints, files
from gcpo.checkpoints import CheckpointError, FileState, Needs
from gcpo.notices import notice

if TYPE_CHECKING:
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)


def survey_machines(folder: Path) -> Mapping[str, FileState]:
    """Return the files of a checkpoint that this machine or another one of the cluster sees.

    On a shared disk all machines see the same files. On local disks every machine has the shards of its own ranks.
    """
    here = ray.get_runtime_context().get_node_id()
    found = checkpoints.survey(folder)
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    look = ray.remote(num_cpus=0)(checkpoints.survey)
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(folder)
        for node in others
    ]
    for answer in ray.get(asked):
        found = {**answer, **found}
    return found


class WholeCheckpoints(_Trainer):
    """Mixin that precedes verl's trainer in the method resolution order.

    verl's checkpoint manager removes old checkpoints while the new one is being written. This class removes them
    after the new manifest is written.
    """

    config: Any
    global_steps: int

    @property
    def _checkpoint_needs(self) -> Needs:
        contents = self.config.actor_rollout_ref.actor.checkpoint.load_contents
        return Needs(self.actor_rollout_wg.world_size, tuple(contents), bool(self.use_critic))

    @contextmanager
    def _trainer_settings(self, **values: Any) -> Iterator[None]:
        """Set these values of ``config.trainer`` inside the ``with`` block."""
        trainer = self.config.trainer
        before = {name: trainer.get(name) for name in values}
        with open_dict(trainer):
            trainer.update(values)
            try:
                yield
            finally:
                trainer.update(before)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Run verl's loop; a full disk, for example for the metrics file, ends it with a one-sentence error."""
        try:
            return super().fit(*args, **kwargs)
        except CheckpointError:
            raise
        except Exception as error:
            root = Path(self.config.trainer.default_local_dir).absolute()
            if not files.is_disk_full(error, root):
                raise
            last = checkpoints.newest_finished(root)
            raise CheckpointError(
                f"step {self.global_steps} could not write a file: {_cause(error, root)}; {_way_on(last)}"
            ) from error

    def _save_checkpoint(self) -> None:
        """Save verl's files, then write the manifest, then remove old checkpoints."""
        trainer = self.config.trainer
        folder = Path(trainer.default_local_dir).absolute() / f"global_step_{self.global_steps}"
        keep = 1 if trainer.get("remove_previous_ckpt_in_save", False) else trainer.get("max_actor_ckpt_to_keep")
        saved = tuple(self.config.actor_rollout_ref.actor.checkpoint.save_contents)
        needs = Needs(self.actor_rollout_wg.world_size, saved, bool(self.use_critic))
        checkpoints.begin(folder)
        try:
            with self._trainer_settings(
                max_actor_ckpt_to_keep=None, max_critic_ckpt_to_keep=None, remove_previous_ckpt_in_save=False
            ):
                super()._save_checkpoint()
            checkpoints.finish(folder, needs, survey_machines)
        except Exception as error:
            if not _is_of_the_disk(error, folder):
                raise
            cause = _cause(error, folder)
            last = checkpoints.abandon(folder)
            raise CheckpointError(
                f"the checkpoint of step {self.global_steps} could not be written to {folder}: {cause}; {_way_on(last)}"
            ) from error
        if keep and int(keep) > 0:
            for old in checkpoints.retire(folder.parent, self.global_steps, int(keep)):
                logger.info("removed the checkpoint %s: %s are kept", old, keep)

    def _load_checkpoint(self) -> None:
        """Let verl load the newest whole checkpoint; report rejected ones with the reasons."""
        trainer = self.config.trainer
        if trainer.resume_mode == "auto":
            choice = checkpoints.choose(
                Path(trainer.default_local_dir).absolute(), self._checkpoint_needs, survey_machines
            )
            for folder, reason in choice.rejected:
                notice(logger, f"checkpoint {folder} is rejected: {reason}")
            for sentence in choice.notes:
                notice(logger, sentence)
            path = choice.path
        elif trainer.resume_mode == "resume_path":
            path = Path(str(trainer.resume_from_path)).absolute()
            for sentence in checkpoints.check_named(path, self._checkpoint_needs, survey_machines):
                notice(logger, sentence)
        else:
            super()._load_checkpoint()
            return
        mode = "disable" if path is None else "resume_path"
        with self._trainer_settings(resume_mode=mode, resume_from_path=None if path is None else str(path)):
            try:
                super()._load_checkpoint()
            except (RayActorError, CheckpointError):
                raise
            except Exception as error:
                raise CheckpointError(
                    f"the checkpoint {path} has all its files and cannot be loaded ({_cause(error)}); remove its "
                    "folder to go on from an older one"
                ) from error


def _is_of_the_disk(error: BaseException, folder: Path) -> bool:
    if files.is_disk_full(error, folder):
        return True
    # A dead worker also causes a lost connection or a timeout, which are OSErrors in Python.
    return isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError)


def _cause(error: BaseException, folder: Path | None = None) -> str:
    """Return the last line of an error, since Ray prepends a worker's traceback; torch does not name a full disk."""
    if folder is not None and files.is_disk_full(error, folder):
        return f"no space is left on the disk ({files.megabytes(files.free_bytes(folder))} are free)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300].rstrip(".")


def _way_on(last: Path | None) -> str:
    if last is None:
        return "there is no checkpoint yet; make room and start the same command again"
    return f"the last whole checkpoint is {last}; make room and start the same command again"
