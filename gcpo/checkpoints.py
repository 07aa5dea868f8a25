"""Detection of complete checkpoints of a run.

A checkpoint is the folder ``global_step_N`` that verl writes: one shard per rank for the model, the optimizer and the
rest (``actor/``), and the state of the data loader (``data.pt``). The manifest ``gcpo_manifest.json`` is written last.
It names every file with its size, so a folder without it was not finished, and one that differs from it was damaged.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gcpo.faults import RunStoppedError
from gcpo.files import sync, write_atomically

MANIFEST = "gcpo_manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"
"""verl's file with the number of the last saved step."""
DATA_STATE = "data.pt"

_STEP = re.compile(r"global_step_(\d+)")
_SHARDS = {"model": "model", "optimizer": "optim", "extra": "extra_state"}
"""verl's names for the contents of a checkpoint, and how the files of each begin."""
_NOT_SAVED = ("merged", "actor-merged")
"""Made later, by an evaluation."""


class CheckpointError(RunStoppedError):
    """A checkpoint that cannot be written or used; the message also names the saved state and the way to go on."""


@dataclass(frozen=True)
class FileState:
    """The state of a file on the disk.

    Attributes:
        size: in bytes.
        problem: reason why it cannot be read, or None if its table of contents is readable.
    """

    size: int
    problem: str | None = None


Survey = Callable[[Path], Mapping[str, FileState]]
"""Returns a checkpoint's files by relative path; over several machines the union of their files."""


@dataclass(frozen=True)
class Needs:
    """The files that a run needs in a checkpoint.

    Attributes:
        ranks: number of the actor's ranks, each of which reads its own shard. None: any number.
        contents: verl's ``load_contents``.
        critic: whether there is a critic.
    """

    ranks: int | None = None
    contents: tuple[str, ...] = ("model", "optimizer", "extra")
    critic: bool = False

    def files(self) -> list[str]:
        """The shards that the run reads."""
        return [
            f"{role}/{_SHARDS[name]}_world_size_{self.ranks}_rank_{rank}.pt"
            for role in (["actor", "critic"] if self.critic else ["actor"])
            for name in self.contents
            if name in _SHARDS
            for rank in range(self.ranks or 0)
        ]


@dataclass
class Choice:
    """The checkpoint from which a run resumes.

    Attributes:
        path: the newest complete checkpoint, or None.
        rejected: newer checkpoints that cannot be used, each with the reason.
        notes: further remarks, one sentence each.
    """

    path: Path | None = None
    rejected: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def step_of(folder: Path) -> int | None:
    """Return N of ``global_step_N``."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoints_in(root: Path) -> list[Path]:
    """Return the folders of checkpoints in ``root``, newest step first."""
    found = {path: step_of(path) for path in root.glob("global_step_*") if path.is_dir()}
    return sorted((path for path, step in found.items() if step is not None), key=lambda path: -(found[path] or 0))


def newest_finished(root: Path) -> Path | None:
    """Return the checkpoint of the highest step that has a manifest, or None."""
    return next((path for path in checkpoints_in(root) if (path / MANIFEST).exists()), None)


def survey(folder: Path) -> dict[str, FileState]:
    """Return the saved files of a checkpoint that are on this machine."""
    found = {}
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        saved = parts[0] not in (MANIFEST, *_NOT_SAVED) and not any(part.startswith(".") for part in parts)
        if saved and path.is_file():
            found["/".join(parts)] = FileState(path.stat().st_size, unreadable(path))
    return found


def unreadable(path: Path) -> str | None:
    """Return why the table of contents of a ``.pt`` or ``.safetensors`` file cannot be read, or None."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".pt":
            zipfile.ZipFile(path).close()  # reads the directory, which is at the end
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="np"):
                pass  # opening compares the header with the size of the file
    except SafetensorError as error:
        return f"is no whole safetensors file ({error})"
    except (zipfile.BadZipFile, ValueError):
        return "is cut off or overwritten: torch's archive has no readable directory"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def read_tracker(root: Path) -> tuple[int | None, str | None]:
    """Return the step that verl's tracker file names, and the problem of the file, or None."""
    path = root / TRACKER
    try:
        text = path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return None, f"{path} cannot be read ({error.strerror})"
    if not text.isascii() or not text.isdigit():
        return None, f"{path} holds {text[:20]!r}, which is no step" if text else f"{path} is empty"
    step = int(text)
    if not (root / f"global_step_{step}").is_dir():
        return step, f"{path} names step {step}, and there is no folder global_step_{step}"
    return step, None


def read_manifest(folder: Path) -> tuple[dict[str, int] | None, str | None]:
    """Return the file sizes of the manifest in ``folder``, or None, and the reason why it cannot be used."""
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_bytes())
        files = {str(name): int(size) for name, size in data["files"].items()}
        step = int(data["step"])
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{MANIFEST} cannot be read ({error!r})"
    if step != step_of(folder):
        return None, f"{MANIFEST} is of step {step}"
    return files, None


def examine(folder: Path, needs: Needs, look: Survey = survey) -> tuple[str | None, list[str]]:
    """Return why a checkpoint is not complete, or None, and remarks about a complete one."""
    if not folder.is_dir():
        return "there is no such folder", []
    manifest, problem = read_manifest(folder)
    if problem:
        return problem, []
    found = look(folder)
    problem = _differs(manifest or {}, found) or _lacks(needs, found) or _damaged(found)
    if problem:
        return problem, []
    notes = []
    if manifest is None:
        notes.append(f"{folder} has no {MANIFEST}, as it was saved by an earlier version: only its files were checked")
    if DATA_STATE not in found:
        notes.append(
            f"{folder} has no state of the data loader ({DATA_STATE}): the run goes on with its weights and reads the "
            "training data from the beginning"
        )
    return None, notes


def _differs(manifest: Mapping[str, int], found: Mapping[str, FileState]) -> str | None:
    for name, size in manifest.items():
        if name in found and found[name].size != size:
            return f"{name} has {found[name].size:,} bytes instead of {size:,}"
        if name not in found and name != DATA_STATE:
            return f"{name} is missing"
    return None


def _lacks(needs: Needs, found: Mapping[str, FileState]) -> str | None:
    missing = next((name for name in needs.files() if name not in found), None)
    saved = {int(match[1]) for name in found if (match := re.search(r"/model_world_size_(\d+)_rank_", name))}
    if missing and saved and needs.ranks not in saved:
        return f"it was saved by {max(saved)} ranks and this run has {needs.ranks}"
    return f"{missing} is missing" if missing else None


def _damaged(found: Mapping[str, FileState]) -> str | None:
    return next((f"{name} {state.problem}" for name, state in found.items() if state.problem), None)


def choose(root: Path, needs: Needs, look: Survey = survey) -> Choice:
    """Return the newest whole checkpoint in ``root``.

    A step that is newer than the step in verl's tracker file is ignored: its saving was not finished, or the
    user changed the file to go back.

    Raises:
        CheckpointError: checkpoints were saved here, and none of them can be used.
    """
    choice = Choice()
    named, problem = read_tracker(root)
    choice.notes += [problem] if problem else []
    folders = checkpoints_in(root)
    for folder in folders:
        if named is not None and not problem and (step_of(folder) or 0) > named:
            reason, notes = f"it is newer than step {named}, which {TRACKER} names", []
        else:
            reason, notes = examine(folder, needs, look)
        if reason is None:
            choice.path = folder
            choice.notes += notes
            return choice
        choice.rejected.append((folder, reason))
    if named is not None or any((folder / MANIFEST).exists() for folder in folders):
        reasons = "; ".join([f"{path.name}: {reason}" for path, reason in choice.rejected[:3]] or choice.notes)
        raise CheckpointError(
            f"no checkpoint in {root} can be used ({reasons}); put one back, or start from the beginning with "
            "trainer.resume_mode=disable"
        )
    return choice


def check_named(folder: Path, needs: Needs, look: Survey = survey) -> list[str]:
    """Check the checkpoint that the user named and return remarks about it.

    Raises:
        CheckpointError: it cannot be used.
    """
    reason, notes = examine(folder, needs, look)
    if reason is not None:
        raise CheckpointError(
            f"the checkpoint {folder} cannot be used: {reason}; name another one in trainer.resume_from_path, or let "
            "trainer.resume_mode=auto choose"
        )
    return notes


def begin(folder: Path) -> None:
    """Mark ``folder`` as not whole before files are written into it."""
    (folder / MANIFEST).unlink(missing_ok=True)


def finish(folder: Path, needs: Needs, look: Survey = survey) -> None:
    """Write the manifest of a checkpoint whose files are complete, and then verl's tracker file.

    Every file of this machine is synced to the disk first, so that a manifest never outlives its files.

    Raises:
        CheckpointError: a file is missing or cannot be read.
        OSError: the manifest cannot be written.
    """
    found = look(folder)
    problem = _lacks(needs, found) or _damaged(found)
    if problem:
        raise CheckpointError(f"the checkpoint {folder} was saved and is not whole: {problem}")
    for name in found:
        with contextlib.suppress(FileNotFoundError):  # the file is on another machine
            sync(folder / name)
    sync(folder)
    step = step_of(folder)
    files = {name: state.size for name, state in sorted(found.items())}
    write_atomically(folder / MANIFEST, json.dumps({"step": step, "files": files}, indent=1) + "\n")
    write_atomically(folder.parent / TRACKER, str(step))


def abandon(folder: Path) -> Path | None:
    """Remove a checkpoint whose saving failed, and let verl's tracker file name the newest finished one.

    Returns:
        The newest checkpoint that has a manifest, or None.
    """
    remove(folder)
    last = newest_finished(folder.parent)
    tracker = folder.parent / TRACKER
    with contextlib.suppress(OSError):  # the disk may still be full; `choose` accepts an empty file
        if last is not None:
            write_atomically(tracker, str(step_of(last)))
        elif tracker.exists() and read_tracker(folder.parent)[0] == step_of(folder):
            tracker.unlink()
    return last


def remove(folder: Path) -> None:
    """Remove the saved files of a checkpoint, the manifest first; merged weights in the same folder stay."""
    begin(folder)
    for name in ("actor", "critic", "transfer_queue"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / DATA_STATE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty, or missing
        folder.rmdir()


def retire(root: Path, step: int, keep: int) -> list[Path]:
    """Remove finished checkpoints of earlier steps so that ``keep`` remain, including that of ``step``.

    Returns:
        The folders whose files were removed.
    """
    earlier = [path for path in checkpoints_in(root) if (step_of(path) or 0) < step and (path / MANIFEST).exists()]
    removed = earlier[max(0, keep - 1) :]
    for folder in removed:
        remove(folder)
    return removed


def way_on(trainer: Mapping[str, Any]) -> str:
    """Return the end of a sentence about a run that ended early: the saved state, and how to resume.

    Args:
        trainer: verl's ``trainer`` group.
    """
    mode = trainer.get("resume_mode", "auto")
    found = newest_finished(Path(str(trainer.get("default_local_dir") or ".")))
    saved = f"the last whole checkpoint is {found} (step {step_of(found)})" if found else "no checkpoint had been saved"
    if mode == "resume_path":
        return f"{saved}; the same command starts again from {trainer.get('resume_from_path')}"
    if mode == "disable":
        return f"{saved}; with trainer.resume_mode=disable the same command starts again from step 1"
    return f"{saved}; the same command {'goes on from it' if found else 'starts again from step 1'}"
