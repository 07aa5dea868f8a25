"""Processes of a real run are killed with -9: the run ends in a sentence and the same command goes on.

Two start-ups. The other processes of a run take the same way (``tests/adapters/test_liveness.py``); what a user sees
for each of them stands in docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.test_training import ROOT, STEPS

pytestmark = pytest.mark.slow

START_SECONDS = 600.0
END_SECONDS = 60.0
"""A run whose process died must have ended by then."""


@dataclass
class Ended:
    """What is known of a run after one of its processes was killed."""

    output: str
    seconds: float
    code: int
    left: list[psutil.Process]
    victim: int
    log: str


def wait_for(condition: Callable[[], object], launcher: subprocess.Popen, what: str, show: Callable[[], str]) -> object:
    deadline = time.monotonic() + START_SECONDS
    while not (found := condition()):
        assert launcher.poll() is None and time.monotonic() < deadline, f"{what} did not come:\n{show()[-6000:]}"
        time.sleep(0.1)
    return found


def title_of(process: psutil.Process) -> str:
    """The command line; empty for a process that has ended meanwhile."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def start_and_kill(inputs: Path, folder: Path, title: str, after: str) -> Ended:
    """Start the run, or go on with it; when ``after`` is printed, kill the process with this title.

    Args:
        inputs: data and model.
        folder: of the run.
        title: how the title of the process begins.
        after: pattern of the line of a step.
    """
    screen = folder / "screen.txt"
    command = [
        *(sys.executable, "-m", "gcpo.tools.launch", "--output", str(folder / "run"), "--"),
        *(sys.executable, "-m", "recipe.gcpo.main_gcpo", f"hydra.run.dir={folder}/hydra", "device=cpu"),
        f"data.train_files={inputs}/data/train.parquet",
        f"data.val_files={inputs}/data/test.parquet",
        f"actor_rollout_ref.model.path={inputs}/model",
        f"trainer.default_local_dir={folder}/checkpoints",
        *STEPS,
        "gcpo.preset=balanced",
        "trainer.total_training_steps=200",
        "trainer.total_epochs=200",
        "trainer.save_freq=1",
        "trainer.max_actor_ckpt_to_keep=2",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    with screen.open("w") as file:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: re.search(after, screen.read_text()), launcher, after, screen.read_text)
        processes = psutil.Process(launcher.pid).children(recursive=True)
        (victim,) = [process for process in processes if title_of(process).startswith(title)]
        victim.kill()
        killed = time.monotonic()
        launcher.wait(timeout=END_SECONDS + 30)
        seconds = time.monotonic() - killed
    finally:
        # Of a run that has not ended.
        for process in [*psutil.Process(launcher.pid).children(recursive=True)] if launcher.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.kill()
        launcher.wait()
    _, left = psutil.wait_procs(processes, timeout=5)
    log = (folder / "run" / "train.log").read_text(errors="replace")
    return Ended(screen.read_text(), seconds, launcher.returncode, left, victim.pid, log)


def test_a_dead_process_ends_the_run_and_the_same_command_goes_on(inputs: Path, tmp_path: Path) -> None:
    """vLLM's engine core in the first start; the agent-loop worker in the second, which goes on from the checkpoint.

    Without the watch the first waits for the weight sync without end, the second for groups that never come.
    """
    ended = start_and_kill(inputs, tmp_path, "VLLM::EngineCore", r"step +1/200")
    saved = check(ended, rf"the engine core of vllm_server_0_0 \(process {ended.victim}\) died")
    # Its draws did not fail by themselves, and no step was trained without them.
    assert "generation failed and is left out" not in ended.log

    ended = start_and_kill(inputs, tmp_path, "ray::GCPOAgentLoop", rf"step +{saved + 1}/200")
    assert f"setting global step to {saved}" in ended.log
    assert check(ended, rf"the agent-loop worker \(process {ended.victim}\) died") > saved


def check(ended: Ended, death: str) -> int:
    """The one sentence, exit code, time and processes; the step of the checkpoint that the sentence names."""
    sentences = re.findall(r"^ *gcpo: (the run ended in step \d+: .*)$", ended.output, re.MULTILINE)
    assert len(sentences) == 1, ended.output[-3000:]
    found = re.search(
        death + r".*; the last whole checkpoint is (\S+) \(step (\d+)\); the same command goes on from it$",
        sentences[0],
    )
    assert found, sentences[0]
    folder, step = Path(found[1]), int(found[2])
    assert folder.name == f"global_step_{step}" and (folder / "actor").is_dir()
    assert ended.code not in (0, None) and ended.seconds < END_SECONDS
    assert "Traceback" not in ended.output
    assert not ended.left, [title_of(process)[:80] for process in ended.left]
    return step
