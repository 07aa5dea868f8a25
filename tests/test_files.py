"""Files that are written whole or not at all, locks between processes, and full disks."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gcpo import files

ROOT = Path(__file__).resolve().parents[1]


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "state.json"
    files.write_atomically(path, "one")
    files.write_atomically(path, b"two")
    assert path.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["state.json"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_file_that_can_not_be_written_stays_as_it_was(tmp_path, monkeypatch, fails):
    path = tmp_path / "state.json"
    path.write_text("one")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, "two")
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_a_full_disk_leaves_the_old_file(small_disk):
    path = small_disk / "state.json"
    path.write_text("one")
    with pytest.raises(OSError) as caught:
        files.write_atomically(path, b"x" * 2**20)
    assert caught.value.errno == errno.ENOSPC and files.is_disk_full(caught.value)
    assert path.read_text() == "one" and [p.name for p in small_disk.iterdir()] == ["state.json"]


def test_a_full_disk_under_torch_is_recognised(small_disk, tmp_path):
    """torch's writer raises a RuntimeError that says nothing of the disk."""
    import torch

    with pytest.raises(Exception) as caught:
        torch.save({"weight": torch.zeros(2**19)}, small_disk / "model.pt")
    assert files.is_disk_full(caught.value, small_disk)
    assert not files.is_disk_full(RuntimeError("PytorchStreamWriter failed writing file"), tmp_path)


def test_the_reason_is_found_behind_other_errors():
    inner = OSError(errno.EDQUOT, "Disk quota exceeded")
    outer = RuntimeError("the save failed")
    outer.__cause__ = inner
    assert files.is_disk_full(outer)
    # Of an error in another process only the text is left.
    assert files.is_disk_full(RuntimeError("ray::save()\nOSError: [Errno 28] No space left on device: 'x'"))
    assert not files.is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not files.is_disk_full(ValueError("28"))


def test_the_limit_of_a_file_is_no_full_disk(tmp_path):
    """RLIMIT_FSIZE gives EFBIG: it is an error of the file, with its own words."""
    code = (
        "import signal, sys; from pathlib import Path; from gcpo import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: files.write_atomically(Path(sys.argv[1]), b'x' * 4096)\n"
        "except OSError as error: print(files.is_disk_full(error), files.why(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "f")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)),
    )
    assert done.stdout == "False File too large\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_takes_the_place_of_one_that_has_files(tmp_path):
    target, made = tmp_path / "model", tmp_path / "new"
    for folder, text in ((target, "old"), (made, "new")):
        folder.mkdir()
        (folder / "weights").write_text(text)
    files.put_in_place(made, target)
    assert (target / "weights").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_can_not_be_put_in_place_leaves_the_old_one(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    with pytest.raises(FileNotFoundError):
        files.put_in_place(tmp_path / "missing", target)
    assert (target / "weights").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model"]


HOLD = """
import sys, time
from pathlib import Path
from gcpo import files
target = Path(sys.argv[1])
with files.lock(target, lambda: print("waiting", flush=True)):
    print("holding", flush=True)
    before = target.read_text() if target.exists() else ""
    time.sleep(float(sys.argv[2]))
    target.write_text(before + "x")
"""


def test_processes_take_turns(tmp_path):
    """Read, wait, write in six processes: without the lock all but one of the letters would be lost."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "n"), "0.2"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    shown = [process.communicate(timeout=60)[0] for process in started]
    assert all(process.returncode == 0 for process in started)
    assert (tmp_path / "n").read_text() == "x" * 6
    assert any("waiting" in text for text in shown)


def test_a_killed_holder_frees_the_lock(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "n"), "600"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "holding\n"
    first.kill()
    first.wait()
    first.stdout.close()
    started = time.monotonic()
    with files.lock(tmp_path / "n"):
        assert time.monotonic() - started < 10


def test_a_folder_has_one_user(tmp_path):
    with files.sole_user(tmp_path):
        code = "import sys, pathlib; from gcpo import files\nwith files.sole_user(pathlib.Path(sys.argv[1])): pass"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "BlockingIOError" in done.stderr
    with files.sole_user(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]
    assert os.listdir(tmp_path) == []
