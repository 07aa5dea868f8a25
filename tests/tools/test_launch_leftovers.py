"""What becomes of a run when its terminal is closed or its launcher is killed, and what the next start does then."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import pytest

from gcpo.tools import launch
from gcpo.tools.launch import leftovers
from gcpo.tools.launch.leftovers import LAUNCH_VARIABLE, LaunchRecord, LeftoverError
from tests.processes import is_alive

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("default_hangup")

STUBBORN = textwrap.dedent(
    """
    import signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.argv[1] == "parent":
        child = subprocess.Popen([sys.executable, "-u", __file__, "child"], start_new_session=True)
        print("child", child.pid, flush=True)
    time.sleep(600)
    """
)


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts processes; those that still run at the end are ended."""
    running: list[subprocess.Popen] = []

    def start(*command: str, **options: object) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-u", *command], stdin=subprocess.DEVNULL, **options)
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


def child_in(log: Path) -> int:
    wait_for(lambda: log.exists() and "child " in log.read_text())
    return int(log.read_text().rsplit("child ", 1)[1].split()[0])


def launcher_arguments(output: Path, *command: str) -> list[str]:
    return ["-m", "gcpo.tools.launch", "--output", str(output), "--", sys.executable, "-u", *command]


@pytest.fixture
def stubborn(tmp_path: Path) -> Path:
    """A command, and a child of it in a session of its own, that do not end at SIGTERM."""
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    return tmp_path / "stubborn.py"


# ---- a closed terminal ----------------------------------------------------------------------------------------------


def test_a_closed_terminal_stops_the_run_in_order(tmp_path: Path, started: Callable) -> None:
    script = tmp_path / "command.py"
    script.write_text(STUBBORN.replace("signal.signal(signal.SIGTERM, signal.SIG_IGN)", ""))
    master, terminal = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        import fcntl
        import termios

        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    output = tmp_path / "out"
    launcher = started(
        *launcher_arguments(output, str(script), "parent"),
        stdout=terminal,
        stderr=terminal,
        cwd=ROOT,
        preexec_fn=take_terminal,
        pass_fds=[terminal],
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(terminal)
    os.set_blocking(master, False)
    child = child_in(output / launch.LOG_FILE)
    os.close(master)  # the kernel sends SIGHUP
    assert launcher.wait(timeout=40) == 128 + signal.SIGHUP
    assert not is_alive(child)
    assert launch.RunState.load(output).status == "stopped"


def test_nohup_lets_a_run_go_on(tmp_path: Path, started: Callable) -> None:
    output = tmp_path / "out"
    launcher = started(
        *launcher_arguments(output, "-c", "print('up', flush=True); import time; time.sleep(4)"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    log = output / launch.LOG_FILE
    wait_for(lambda: log.exists() and log.read_text().rstrip().endswith("up"))
    launcher.send_signal(signal.SIGHUP)
    assert launcher.wait(timeout=30) == 0
    assert launch.RunState.load(output).status == "complete"


# ---- a killed launcher ----------------------------------------------------------------------------------------------


def test_a_killed_launcher_takes_its_command_along(tmp_path: Path, started: Callable) -> None:
    output = tmp_path / "out"
    launcher = started(
        *launcher_arguments(output, "-c", "import os, time; print('child', os.getpid(), flush=True); time.sleep(600)"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    command = child_in(output / launch.LOG_FILE)
    launcher.kill()
    wait_for(lambda: not is_alive(command))


def test_the_next_start_ends_what_a_killed_launcher_left(
    tmp_path: Path, started: Callable, stubborn: Path, capfd: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out"
    bystander = started("-c", "import time; time.sleep(600)", env={**os.environ, LAUNCH_VARIABLE: "another-run"})
    launcher = started(*launcher_arguments(output, str(stubborn), "parent"), cwd=ROOT, stdout=subprocess.DEVNULL)
    child = child_in(output / launch.LOG_FILE)
    wait_for(lambda: launch.RunState.load(output).launch.pid is not None)
    command = launch.RunState.load(output).launch.pid
    launcher.kill()
    launcher.wait()
    assert is_alive(command) and is_alive(child)
    assert launch.launch([sys.executable, "-c", "print('again')"], output, resume_changed=True) == 0
    assert "the last start was not ended in order: ended 2 processes" in capfd.readouterr().out
    assert not is_alive(command) and not is_alive(child) and is_alive(bystander.pid)
    state = launch.RunState.load(output)
    assert state.status == "complete" and state.starts == 2


def test_a_start_after_an_orderly_end_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    for _ in range(2):
        assert launch.launch([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "out") == 3
    assert "last start" not in capfd.readouterr().out


def test_a_number_that_another_process_was_given_is_not_ended(started: Callable) -> None:
    other = started("-c", "import time; time.sleep(600)")
    born = psutil.Process(other.pid).create_time()
    record = LaunchRecord("gone", pid=other.pid, created=born - 3600)
    assert leftovers.clear(record, was_running=True) is None and is_alive(other.pid)


def test_a_process_that_can_not_be_ended_is_named(started: Callable) -> None:
    """Of another user's process neither the environment can be read nor can it be ended: the number is left."""
    other = started("-c", "import time; time.sleep(600)")
    record = LaunchRecord("theirs", pid=other.pid, created=psutil.Process(other.pid).create_time())
    with pytest.raises(LeftoverError, match=rf"process {other.pid} \(user \S+\) of the last start is still running"):
        leftovers.clear(record, was_running=True)
    assert is_alive(other.pid)


def test_a_refusal_over_a_leftover_is_one_sentence(
    tmp_path: Path, started: Callable, capfd: pytest.CaptureFixture
) -> None:
    other = started("-c", "import time; time.sleep(600)")
    record = LaunchRecord("theirs", pid=other.pid, created=psutil.Process(other.pid).create_time())
    launch.RunState(["x"], status="running", launch=record).save(tmp_path)
    assert launch.main(["--output", str(tmp_path), "--", "x"]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: process {other.pid} ") and error.count("\n") == 1


def test_another_machine_is_said() -> None:
    record = LaunchRecord("there", host="node-7", pid=os.getpid(), created=0.0)
    assert "ran on the machine node-7" in leftovers.clear(record, was_running=True)
    assert leftovers.clear(record, was_running=False) is None


def test_children_without_the_mark_are_found(started: Callable) -> None:
    """A process that sets its title may overwrite its environment, as two of Ray's agents do."""
    code = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], env={})\n"
        "time.sleep(600)"
    )
    parent = started("-c", code, env={**os.environ, LAUNCH_VARIABLE: "titled"})
    wait_for(lambda: len(leftovers.processes("titled")) == 2)
    pids = [process.pid for process in leftovers.processes("titled")]
    assert parent.pid in pids and leftovers.end("titled") == 2
    assert not any(is_alive(pid) for pid in pids)


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record = LaunchRecord("a", pid=3, created=1.5, segments={"psm_1": 4}, sessions=["/tmp/ray/session_x"])
    launch.RunState(["c"], launch=record).save(tmp_path)
    assert launch.RunState.load(tmp_path).launch == record
    data = json.loads((tmp_path / launch.STATE_FILE).read_text())
    for changed in ({"id": "a"}, "text", None, {**data["launch"], "more": 1}):
        (tmp_path / launch.STATE_FILE).write_text(json.dumps({**data, "launch": changed}))
        assert launch.RunState.load(tmp_path).launch is None
    del data["launch"]  # of an earlier version
    (tmp_path / launch.STATE_FILE).write_text(json.dumps(data))
    assert launch.RunState.load(tmp_path).command == ["c"]


# ---- shared memory and Ray's session ---------------------------------------------------------------------------------

HOLDER = """
import sys, time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
for name in sys.argv[1:]:
    segment = SharedMemory(name, create=True, size=4096)
    resource_tracker.unregister(segment._name, "shared_memory")
    globals()[name] = segment
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture
def names() -> Iterator[list[str]]:
    """Names of segments; those that are left at the end are removed."""
    made = [f"{kind}_test_{os.getpid()}_{i}" for i, kind in enumerate(("psm", "verl_weights", "another", "psm"))]
    yield made
    for name in made:
        (leftovers.SHARED_MEMORY / name).unlink(missing_ok=True)


def test_segments_of_killed_processes_are_removed(started: Callable, names: list[str]) -> None:
    holder = started("-c", HOLDER, *names, env={**os.environ, LAUNCH_VARIABLE: "shm"}, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"up\n"
    record = LaunchRecord("shm")
    assert record.update() and not record.update()
    # The third is of no known kind: the processes of a run may also map what others share with them.
    assert set(record.segments) == {names[0], names[1], names[3]}
    holder.kill()
    holder.wait()
    holder.stdout.close()
    used = SharedMemory(names[3])  # another process uses it now
    sentence = leftovers.clear(record, was_running=True)
    # Python's resource tracker may still be there as well.
    assert sentence.startswith("the last start was not ended in order: ")
    assert sentence.endswith("removed 2 shared-memory segments")
    there = {name for name in names if (leftovers.SHARED_MEMORY / name).exists()}
    # This process is no other one for itself, but it is not one of that start either.
    assert there == {names[2], names[3]}
    used.close()


def test_a_segment_of_the_same_name_stays(names: list[str]) -> None:
    path = leftovers.SHARED_MEMORY / names[0]
    path.write_bytes(b"another run's")
    record = LaunchRecord("gone", segments={names[0]: path.stat().st_ino + 1})
    assert leftovers.clear(record, was_running=True) is None and path.exists()


def test_segments_of_a_run_that_is_stopped_are_removed(
    tmp_path: Path, started: Callable, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the end of a stop, vLLM can't remove its own."""
    script = tmp_path / "holder.py"
    script.write_text(HOLDER.replace('"up"', '"child", 1'))
    launcher = started(
        *launcher_arguments(tmp_path / "out", str(script), names[0]), cwd=ROOT, stdout=subprocess.DEVNULL
    )
    child_in(tmp_path / "out" / launch.LOG_FILE)
    wait_for(lambda: names[0] in launch.RunState.load(tmp_path / "out").launch.segments, 30)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=30) == 143
    assert not (leftovers.SHARED_MEMORY / names[0]).exists()


def test_the_session_of_ray_is_removed_when_nobody_uses_it(tmp_path: Path, started: Callable) -> None:
    sessions = [tmp_path / f"session_2026-01-0{i}_10-00-00_000001_{i}" for i in (1, 2)]
    for session in sessions:
        (session / "logs").mkdir(parents=True)
    sleep = "import time; time.sleep(600)"
    ours = started("-c", sleep, f"--session-dir={sessions[0]}", env={**os.environ, LAUNCH_VARIABLE: "ray"})
    shared = started("-c", sleep, f"--session_dir={sessions[1]}", env={**os.environ, LAUNCH_VARIABLE: "ray"})
    started("-c", sleep, f"--session-dir={sessions[1]}")
    record = LaunchRecord("ray")
    wait_for(lambda: record.update() or len(record.sessions) == 2)
    wait_for(lambda: record.update() or len(record.sessions) == 2)
    sentence = leftovers.clear(record, was_running=True)
    assert sentence.endswith("ended 2 processes, removed the folder of its Ray session")
    assert not sessions[0].exists() and sessions[1].exists()
    assert ours.wait(timeout=10) and shared.wait(timeout=10)


@pytest.mark.parametrize("name", ["/tmp", "/tmp/ray", "relative/session_2026-01-01_10-00-00_1_1"])
def test_a_folder_that_is_no_session_stays(name: str) -> None:
    assert leftovers.remove_sessions([name]) == 0


def test_the_host_is_this_one() -> None:
    assert LaunchRecord("x").host == socket.gethostname()
