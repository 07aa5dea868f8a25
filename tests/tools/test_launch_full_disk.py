"""Every file that the launcher and the report write, on a disk without room."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gcpo.tools import launch, report
from gcpo.tools.display import Display
from gcpo.tools.groups import page
from gcpo.tools.launch import metrics
from gcpo.tools.launch.log import Log, error_summary
from gcpo.tools.metrics import EARLIER_METRICS_FILE, METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parents[2]


def fill(folder: Path) -> Path:
    """Take all room; removing the file gives it back."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    return path


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_loses_lines_and_goes_on(tmp_path: Path) -> None:
    log = Log(Path("/dev/full"))
    log.write("one")
    log.write("two")
    assert log.lost == 2 and "No space left on device" in log.problem and "the run goes on" in log.problem
    log.close()
    log.write("after the end")
    log = Log(tmp_path / "log")
    log.lost, log.problem = 3, "the disk was full"
    log.write("room again")
    assert (tmp_path / "log").read_text() == "### 3 lines are missing here: the disk was full\nroom again\n"


def test_a_run_whose_log_has_no_room_does_not_wait(small_disk: Path, capfd: pytest.CaptureFixture) -> None:
    """More output than a pipe holds: a reader that has stopped would block the command for ever."""
    output = small_disk / "out"
    code = "for i in range(20_000): print('x' * 99)"
    assert launch.launch([sys.executable, "-c", code], output) == 0
    shown = capfd.readouterr()
    assert shown.out.count("train.log cannot be written (No space left on device); the run goes on") == 1
    assert "Traceback" not in shown.out + shown.err
    assert (output / launch.LOG_FILE).stat().st_size > 100_000


def test_no_room_for_the_state_at_the_start(small_disk: Path, capfd: pytest.CaptureFixture) -> None:
    output = small_disk / "out"
    output.mkdir()
    launch.RunState(["old"], status="failed").save(output)
    filler = fill(small_disk)
    arguments = ["--output", str(output), "--resume-changed", "--", sys.executable, "-c", "pass"]
    assert launch.main(arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: can't write into {output}: No space left on device; make room and start")
    assert error.count("\n") == 1
    assert launch.RunState.load(output).command == ["old"]
    filler.unlink()
    assert launch.main(arguments) == 0


def test_no_room_for_the_state_at_the_end(small_disk: Path, capfd: pytest.CaptureFixture) -> None:
    output = small_disk / "out"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom tests.tools.test_launch_full_disk import *\n"
    code += f"fill(Path({str(small_disk)!r})); print('full')"
    assert launch.launch([sys.executable, "-c", code], output) == 0
    shown = capfd.readouterr()
    assert "run.json cannot be written (No space left on device); the next start will take this run for" in shown.err
    assert "Traceback" not in shown.out + shown.err and "done after" in shown.out
    assert launch.RunState.load(output).status == "running"


@pytest.fixture
def two_files(tmp_path: Path) -> Path:
    line = lambda step: json.dumps({"step": step, "data": {"a": step}}) + "\n"  # noqa: E731
    (tmp_path / EARLIER_METRICS_FILE).write_text(line(1))
    (tmp_path / METRICS_FILE).write_text(line(2))
    return tmp_path


@pytest.mark.parametrize("function", [metrics.keep_earlier_metrics, metrics.join_metrics])
def test_no_metrics_are_lost(two_files: Path, monkeypatch: pytest.MonkeyPatch, function: object) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "write_atomically", full)
        with pytest.raises(OSError):
            function(two_files)
    assert list(read_metrics(two_files)) == [1, 2]
    function(two_files)
    assert list(read_metrics(two_files)) == [1, 2]


def test_a_cut_line_of_an_earlier_start_does_not_take_the_next_one_along(tmp_path: Path) -> None:
    (tmp_path / EARLIER_METRICS_FILE).write_text('{"step": 1, "da')
    (tmp_path / METRICS_FILE).write_text('{"step": 2, "data": {"a": 1}}\n')
    metrics.keep_earlier_metrics(tmp_path)
    assert list(read_metrics(tmp_path)) == [2]


def test_no_room_for_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "data": {"critic/score/mean": 1}}\n')
    (tmp_path / "curves.png").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(report, "write_atomically", full)
        patch.setattr(page, "write_atomically", full)
        assert report.main([str(tmp_path)]) == 2
    shown = capfd.readouterr()
    assert shown.err.splitlines() == [
        f"error: {tmp_path}/{name} can't be written: No space left on device" for name in ("curves.png", "report.html")
    ]
    assert "before and after" in shown.out  # the table needs no disk
    assert (tmp_path / "curves.png").read_bytes() == b"old"
    assert report.main([str(tmp_path)]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_command_says_of_a_full_disk_is_one_sentence() -> None:
    lines = [
        "Traceback (most recent call last):",
        '  File "/x/tracking.py", line 545, in log',
        "ray.exceptions.RayTaskError(OSError): ray::TaskRunnerV1.run() (pid=1)",
        "OSError: [Errno 28] No space left on device",
    ]
    (sentence,) = error_summary(lines)
    assert sentence.startswith("no space is left on the disk (OSError: [Errno 28]") and "start the same" in sentence


def test_our_own_errors_are_one_sentence() -> None:
    lines = [
        "ray.exceptions.RayTaskError(CheckpointError): ray::TaskRunnerV1.run() (pid=1)",
        '  File "/x/checkpoints.py", line 9, in _load_checkpoint',
        "gcpo.checkpoints.CheckpointError: the checkpoint /x/global_step_2 cannot be used: data.pt has 2 bytes",
    ]
    assert error_summary(lines) == ["the checkpoint /x/global_step_2 cannot be used: data.pt has 2 bytes"]


def test_a_display_that_can_not_be_written_to_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def broken(text: str, **_: object) -> None:
        calls.append(text)
        raise OSError(errno.EIO, "Input/output error")

    display = Display()
    monkeypatch.setattr(display.bar.console, "print", broken)
    display.note("one")
    display.note("two")
    display.refresh("training")
    display.close()
    assert len(calls) == 1 and calls[0].endswith("] one")


def test_output_that_goes_to_a_full_disk(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as device:
        arguments = [
            "-m",
            "gcpo.tools.launch",
            "--output",
            str(tmp_path / "out"),
            "--",
            sys.executable,
            "-c",
            "print(1)",
        ]
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, stdout=device, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 0 and done.stderr == ""
    assert launch.RunState.load(tmp_path / "out").status == "complete"
