"""The launcher, with a small program instead of a training run. The real stack is in tests/end_to_end."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from gcpo.notices import TOTAL_STEPS
from gcpo.tools import display, launch
from gcpo.tools.launch import leftovers
from gcpo.tools.launch.log import error_summary, lines_of
from gcpo.tools.launch.metrics import MetricsTail
from gcpo.tools.launch.state import settings_that_differ
from gcpo.tools.metrics import EARLIER_METRICS_FILE, SHOWN, Shown, read_metrics, step_line

pytestmark = pytest.mark.usefixtures("default_hangup")

ROOT = Path(__file__).resolve().parents[2]

FAKE = textwrap.dedent(
    """
    import json, os, subprocess, sys, time
    output, mode, steps = sys.argv[1], sys.argv[2], int(sys.argv[3].split("=")[1])
    print("ray init kwargs: {}")
    print("\\x1b[36m(TaskRunnerV1 pid=7)\\x1b[0m INFO:now:Total training steps: %d" % steps)
    saved = os.path.join(output, "saved")
    start = int(open(saved).read()) if os.path.exists(saved) else 0
    if start:
        print(f"(TaskRunnerV1 pid=7) Resuming from {output}/global_step_{start}, setting global step to {start}")
    log = open(os.environ["VERL_FILE_LOGGER_PATH"], "wb", buffering=0)  # empties the file, as verl does
    def write(step, data):
        log.write(json.dumps({"step": step, "data": data}).encode() + b"\\n")
    write(start, {"val-core/x/acc/mean@1": 0.4 + 0.1 * start})
    print("Initial validation metrics: {}")
    if mode == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        print("child", child.pid)
        time.sleep(600)
    for step in range(start + 1, steps + 1):
        write(step, {"critic/score/mean": 0.1 * step, "training/global_step": step, "timing_s/step": 2.0})
        open(saved, "w").write(str(step))
        sys.stderr.write(f"\\rTraining Progress:  50%|#####     | {step}/{steps} [00:01<00:01]")
        if mode == "fail" and step == 2:
            print("\\n(WorkerDict pid=9) RuntimeError: noise of a worker")
            raise ValueError("the reward is not a number\\nask its author")
    print("\\nFinal validation metrics: {}")
    """
)


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    output = tmp_path / "out"

    def command(mode: str = "ok", steps: int = 3) -> list[str]:
        return [sys.executable, "-u", str(script), str(output), mode, f"trainer.total_training_steps={steps}"]

    return output, command


def start(output: Path, command: list[str], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gcpo.tools.launch", "--output", str(output), *options, "--", *command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_run_its_log_and_its_lines(fake, capfd):
    output, command = fake
    assert launch.main(["--output", str(output), "--", *command()]) == 0
    shown = capfd.readouterr().out
    assert "\x1b" not in shown and "\r" not in shown
    assert "step 1/3  reward 0.100  2.0 s" in shown and "step 0/3  held-out 40.0 %" in shown
    assert "done after" in shown and "3 steps" in shown
    assert shown.index("] step 0/3") < shown.index("] training\n") < shown.index("] step 1/3")
    log = (output / launch.LOG_FILE).read_text()
    assert "(TaskRunnerV1 pid=7) INFO:now:Total training steps: 3" in log and "\x1b" not in log
    assert list(read_metrics(output)) == [0, 1, 2, 3]
    assert launch.RunState.load(output).status == "complete"


def test_a_complete_run_is_left_alone_and_a_longer_one_goes_on(fake, capfd):
    output, command = fake
    assert launch.launch(command(), output) == 0
    size = (output / launch.LOG_FILE).stat().st_size
    assert launch.launch(command(), output) == 0
    assert (output / launch.LOG_FILE).stat().st_size == size
    assert launch.launch(command(steps=2), output) == 0
    assert "holds the complete run (3 steps)" in capfd.readouterr().out
    assert launch.launch(command(steps=5), output) == 0
    metrics = read_metrics(output)
    assert list(metrics) == [0, 1, 2, 3, 4, 5]
    # Validation when the run goes on is step 3 once more: both kinds of metrics stay.
    assert metrics[3] == {"critic/score/mean": pytest.approx(0.3), "training/global_step": 3, "timing_s/step": 2.0} | {
        "val-core/x/acc/mean@1": pytest.approx(0.7)
    }
    assert not (output / EARLIER_METRICS_FILE).exists()
    assert launch.RunState.load(output).starts == 2


def test_a_failed_run_says_why_and_goes_on_later(fake, capfd):
    output, command = fake
    assert launch.launch(command("fail"), output) == 1
    error = capfd.readouterr().err
    assert "ValueError: the reward is not a number\n  ask its author" in error and "noise" not in error
    assert str(output / launch.LOG_FILE) in error
    assert launch.main(["--output", str(output), "--", *command()]) == 2
    assert "holds a run with other settings (fail, ok)" in capfd.readouterr().err
    assert launch.main(["--output", str(output), "--resume-changed", "--", *command()]) == 0
    assert list(read_metrics(output)) == [0, 1, 2, 3]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stop_ends_what_was_started_and_nothing_else(fake, number, code):
    output, command = fake
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = start(output, command("hang"))
    log = output / launch.LOG_FILE
    deadline = time.monotonic() + 20
    while not (log.exists() and "child" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    child = int(log.read_text().rsplit("child ", 1)[1].split()[0])
    process.send_signal(number)
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert "stopped after" in shown and "goes on from the checkpoint" in shown
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    assert launch.RunState.load(output).status == "stopped"


def test_two_launches_in_one_directory(fake):
    output, command = fake
    first = start(output, command("hang"))
    while not (output / launch.LOG_FILE).exists():
        time.sleep(0.05)
    second = start(output, command("hang"))
    shown, _ = second.communicate(timeout=20)
    assert second.returncode == 2 and f"a run is going on in {output}" in shown
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=30) == 143


def test_the_report_follows_a_complete_run(fake, capfd):
    """One process for both, so that a script can become it with `exec` and a signal reaches it."""
    output, command = fake
    assert launch.main(["--output", str(output), "--report", "--", *command("fail")]) == 1
    assert "curves" not in capfd.readouterr().out
    assert launch.main(["--output", str(output), "--report", "--resume-changed", "--", *command()]) == 0
    assert f"curves:     {output}/curves.png" in capfd.readouterr().out and (output / "curves.png").exists()


def test_a_command_that_is_not_there(tmp_path, capfd):
    assert launch.main(["--output", str(tmp_path / "out"), "--", "/no/such/program"]) == 2
    assert "can't start /no/such/program: No such file" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        launch.main(["--output", str(tmp_path / "out")])
    assert "training command after --" in capfd.readouterr().err


def test_lines_and_control_codes():
    output = io.BytesIO(b"one\ntwo\r\n\x1b[31mthree\x1b[0m\rfo\xffur\rfive")
    assert list(lines_of(output)) == ["one", "two", "three", "fo\ufffdur", "five"]


def test_lines_come_when_they_are_printed():
    """A reader that waits for a full buffer would keep the log behind the run."""
    reading, writing = os.pipe()
    lines = lines_of(os.fdopen(reading, "rb"))
    for text in ("first", "second"):
        os.write(writing, f"{text}\nand a part".encode())
        assert next(lines).endswith(text)
    os.close(writing)
    assert list(lines) == ["and a part"]


def test_notices_are_shown_once_and_the_last_line_while_it_starts(fake, capfd, monkeypatch):
    output, _ = fake
    monkeypatch.setattr(display, "HEARTBEAT_SECONDS", 0.5)
    code = (
        "import time\nfor i in range(2): print('(TaskRunnerV1 pid=7) WARNING:x:gcpo notice: step_4 is rejected')\n"
        "print('(TaskRunnerV1 pid=7)   loading   the model', flush=True); time.sleep(2)"
    )
    assert launch.launch([sys.executable, "-c", code], output) == 0
    shown = capfd.readouterr().out
    assert shown.count("] step_4 is rejected\n") == 1
    assert "] starting\n" in shown and "] still at it: starting: loading the model\n" in shown


def test_the_total_comes_from_the_metrics_where_the_command_leaves_it_out(fake, capfd):
    output, _ = fake
    code = (
        "import json, os\nfile = open(os.environ['VERL_FILE_LOGGER_PATH'], 'w')\n"
        f"print(json.dumps({{'step': 3, 'data': {{'training/global_step': 3, {TOTAL_STEPS!r}: 20}}}}), file=file)"
    )
    assert launch.launch([sys.executable, "-c", code], output) == 0
    assert "step  3/20" in capfd.readouterr().out


def test_error_of_the_main_process_wins_over_noise():
    lines = [
        "(WorkerDict pid=3) Traceback (most recent call last):",
        "(WorkerDict pid=3) zmq.error.ContextTerminated: Context was terminated",
        "Traceback (most recent call last):",
        '  File "/x/main.py", line 3, in main',
        "ray.exceptions.RayTaskError(KeyError): ray::TaskRunnerV1.run() (pid=1)",
        '  File "/x/trainer.py", line 9, in fit',
        "KeyError: 'prompt'",
        "(TaskRunnerV1 pid=1) Exception ignored in: <function f>",
    ]
    assert error_summary(lines) == ['in File "/x/trainer.py", line 9, in fit', "KeyError: 'prompt'"]


def test_error_of_a_worker_that_died():
    lines = [
        "(WorkerDict pid=3) RuntimeError: CUDA out of memory",
        "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.",
        "\tclass_name: WorkerDict",
    ]
    assert error_summary(lines) == [*lines[1:], "RuntimeError: CUDA out of memory"]


def test_error_without_an_exception():
    assert error_summary(["ValueError: handled long ago", "x", "gcpo: n is 1; set it to 2"]) == [
        "gcpo: n is 1; set it to 2"
    ]
    assert error_summary(["a", "", "b"]) == ["a", "b"]


def test_step_line():
    metrics = {
        "critic/score/mean": 0.4125,
        "val-core/gcpo/arithmetic/acc/mean@1": 0.475,
        "gcpo/upsilon/mean": 1.9,
        "gcpo/upsilon/spread_in_group": 0.06,
        "gcpo/reference/kl_mean": 0.0123,
        "response_length/mean": 23.4,
        "timing_s/step": 2.14,
        "timing_s/gen": 0.9,
        "timing_s/old_log_prob": 0.4,
        "timing_s/update_actor": 0.6,
    }
    assert step_line(7, metrics, 40) == (
        "step  7/40  reward 0.412  held-out 47.5 %  Υ 1.900±0.060  κ-KL 0.0123  length 23  "
        "2.1 s (generate 0.9, score 0.4, update 0.6)"
    )
    assert step_line(7, {}) == "step 7"


def test_step_line_names_missing_shares():
    """Those above 0; a share that rounds to nothing is not shown as 0."""
    metrics = {
        "gcpo/missing/draws_frac": 0.3125,
        "gcpo/missing/targets_frac": 0.0,
        "gcpo/missing/references_frac": 0.004,
    }
    assert step_line(3, metrics) == "step 3  missing 31 % of draws, 0.4 % of references"
    assert step_line(3, dict.fromkeys(metrics, 0.0)) == "step 3"
    assert step_line(3, {"gcpo/missing/draws_frac": 1.0}) == "step 3  missing 100 % of draws"


def test_a_method_adds_what_it_shows_by_its_prefix(monkeypatch):
    monkeypatch.setitem(SHOWN, "toy/", (Shown(("toy/gain",), "gain {:+.1f}", spread="toy/spread"),))
    assert step_line(3, {"toy/gain": 0.25, "toy/spread": 0.5}) == "step 3  gain +0.2±0.500"
    assert step_line(3, {"toy/other": 1.0}) == "step 3"


def on_terminal(monkeypatch, clock):
    """A display on a terminal of 100 columns, and where it writes."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, highlight=False, soft_wrap=True)
    monkeypatch.setattr(display, "Console", lambda **options: console)
    return display.Display(clock), screen


def test_time_left_leaves_the_warm_up_out(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    now = [0.0]
    shown, screen = on_terminal(monkeypatch, lambda: now[0])
    for step, moment in ((4, 600.0), (5, 640.0), (6, 700.0), (7, 750.0)):
        now[0] = moment
        shown.refresh("training", f"step {step}", step, 10)
    # The run went on from step 3; its first step warmed up for ten minutes, and the others took 50 seconds each.
    assert shown.bar.tasks[0].time_remaining == 150
    assert "training: step 7" in screen.getvalue() and "7/10" in screen.getvalue() and "0:02:30" in screen.getvalue()
    shown.close()


@pytest.mark.parametrize(("seconds", "text"), [(48.9, "48 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_duration(seconds, text):
    assert display.duration(seconds) == text


def test_settings_that_differ():
    before = ["/old/python", "-m", "recipe", "gcpo.kappa=0.06", "trainer.total_training_steps=3", "trainer.save_freq=1"]
    now = ["/new/python", "-m", "recipe", "gcpo.kappa=0", "trainer.total_training_steps=9", "+ray_kwargs.x=1"]
    assert settings_that_differ(before, now) == ["gcpo.kappa=0.06", "gcpo.kappa=0"]


def test_metrics_file_that_is_written_while_it_is_read(tmp_path):
    tail = MetricsTail(tmp_path / "m.jsonl")
    assert tail.read() == []
    with (tmp_path / "m.jsonl").open("w", buffering=1) as file:
        file.write('{"step": 1, "data": {"a": 1}}\n{"step": 2, "da')
        file.flush()
        assert tail.read() == [(1, {"a": 1.0})]
        file.write('ta": {"a": 2}}\n')
        file.flush()
        assert tail.read() == [(2, {"a": 2.0})] and tail.read() == []


def test_state_that_can_not_be_read(tmp_path):
    (tmp_path / launch.STATE_FILE).write_text("{")
    assert launch.RunState.load(tmp_path) is None
    launch.RunState(["a"], status="failed").save(tmp_path)
    assert json.loads((tmp_path / launch.STATE_FILE).read_text())["status"] == "failed"


def test_processes_are_found_by_their_launch():
    mark = f"test-{os.getpid()}"
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, launch.LAUNCH_VARIABLE: mark}
    )
    deadline = time.monotonic() + 5
    while [one.pid for one in leftovers.processes(mark)] != [process.pid] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert leftovers.processes(mark) == [psutil.Process(process.pid)] and leftovers.processes("other") == []
    process.kill()
    process.wait()
