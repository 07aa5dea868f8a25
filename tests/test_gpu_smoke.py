"""The GPU check on the CPU: its engine part small, and the judgements of both parts."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common import module_of
from benchmarks.gpu_smoke import engine, loop
from benchmarks.gpu_smoke.machine import shares
from benchmarks.gpu_smoke.problem import SMALL, make_group
from tests.test_scripts import Sandbox

ROOT = Path(__file__).resolve().parents[1]
ERRORS = {
    "packed": {"log-probabilities": 2e-3, "states": 1e-5, "gradient of kappa": 3e-2},
    "dense": {"log-probabilities": 2e-3, "states": 1e-6, "gradient of kappa": 2e-2},
}


def smoke(output: Path, *code: str) -> subprocess.CompletedProcess[str]:
    """The engine part in a process of its own, after ``code``."""
    program = "\n".join(["import sys", "from benchmarks.gpu_smoke import engine", *code, "sys.exit(engine.main())"])
    sizes = ["--cpu", "--output", str(output), "--n", "3", "--lengths", "24", "--check-length", "20"]
    return subprocess.run(
        [sys.executable, "-c", program, *sizes],
        cwd=ROOT,
        env={**os.environ, "VERL_PLATFORM": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_packed_and_single_passes_agree(tmp_path: Path) -> None:
    done = smoke(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "packed and single passes agree" in done.stdout and "| GC²PO, hidden_state | " in done.stdout
    assert (tmp_path / "engine.md").read_text() in done.stdout
    result = json.loads((tmp_path / "engine.json").read_text())
    found = result["the kernel for CPUs"]
    assert all(error < 1e-3 for error in found["errors"]["packed"].values()) and not found["disagreements"]
    case = found["rates"]["n = 3, T = 24"]
    group = make_group(3, 24, SMALL)
    assert case["tokens"]["dense"] == sum(len(request.context) + len(request.target) for request in group.contexts)
    assert case["tokens"]["packed"] < case["tokens"]["dense"]
    assert all(one["seconds"] > 0 and one["peak MiB"] > 0 for one in case["passes"].values())
    assert 0 < case["shares"]["of the product"] < 1 and 0 < case["shares"]["of the copy"] < 1


BROKEN = """
import gcpo.adapters.engine, gcpo.adapters.perturbed, gcpo.scoring.attention
from torch.nn.functional import scaled_dot_product_attention as attention

class AsOneSequence:
    def apply(query, key, value, pack, scaling):
        return attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)

gcpo.scoring.attention.SubtreeAttention = AsOneSequence
gcpo.adapters.engine.probe_trees = lambda *args: None
gcpo.adapters.perturbed.PerturbedRow._move = lambda self, hidden: None
"""
"""Branches of a tree see each other, and no state is perturbed."""


def test_broken_passes_are_noticed(tmp_path: Path) -> None:
    done = smoke(tmp_path, BROKEN)
    assert done.returncode == 1, done.stderr[-3000:]
    for name in ("log-probabilities", "gradient of kappa", "GC²PO, lm_head", "GC²PO, hidden_state"):
        assert f"gpu_smoke: {name}: packed passes err by" in done.stdout


def test_what_the_precision_explains() -> None:
    assert engine.disagreements(ERRORS) == []
    wrong = copy.deepcopy(ERRORS)
    wrong["packed"] |= {"log-probabilities": 4.1e-3, "states": math.nan}
    assert [line.partition(":")[0] for line in engine.disagreements(wrong)] == ["log-probabilities", "states"]


def test_distance_by_hand() -> None:
    """Differences of 3 and 4 beside a norm of 10."""
    right = [torch.tensor([[6.0, 0.0]]), torch.tensor([8.0])]
    assert engine.distance([torch.tensor([[9.0, 0.0]]), torch.tensor([4.0])], right) == pytest.approx(0.5)


def test_shares_by_hand() -> None:
    """A model of one layer of width 4: 100 weights; 2 * 100 * 10 + 4 * 4 * 30 FLOP in two seconds."""

    class Config:
        num_hidden_layers, hidden_size = 1, 4

    class Model:
        config = Config()
        model = torch.nn.Module()

    Model.model.layers = torch.nn.ModuleList([torch.nn.Linear(25, 4, bias=False)])
    found = shares(2.0, 10, 30, Model, 2, {"FLOP/s": 24_800.0, "bytes/s": 1_000.0})
    assert found == pytest.approx({"of the product": 0.05, "of the copy": 0.1})
    assert shares(None, 10, 30, Model, 2, {}) == {}
    assert engine.cell({"seconds": None, "peak MiB": "out of memory"}) == "out of memory"


def test_problems_of_a_run() -> None:
    good = {"step": 1, "actor/pg_loss": 0.1, "actor/grad_norm": 1.0, "training/rollout_probs_diff_mean": 1e-3}
    assert loop.problems("light", [good], 2e-2) == []
    (line,) = loop.problems("light", [{**good, "gcpo/kl_loss": math.inf}], 2e-2)
    assert line == "light, step 1: gcpo/kl_loss is inf"
    for difference in (0.03, math.nan):
        (line,) = loop.problems("light", [{**good, "training/rollout_probs_diff_mean": difference}], 2e-2)
        assert line.startswith("light, step 1: the probabilities of vLLM and of the actor differ by ")
    assert len(loop.problems("grpo", [{"step": 1}], 2e-2)) == 1  # a run that does not measure them


@pytest.mark.parametrize("part", [engine, loop])
def test_no_device(part, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_smoke"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        part.main()
    assert "no CUDA device answers; --cpu runs the same" in capsys.readouterr().err


def test_the_module_of_a_program() -> None:
    assert module_of(ROOT / "benchmarks/gpu_smoke/engine.py") == "gpu_smoke.engine"
    assert module_of(ROOT / "benchmarks/packing.py") == "packing" and module_of(Path("/bin/pytest")) == "pytest"


# ---- scripts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_the_script_runs_its_parts(sandbox: Sandbox) -> None:
    done = sandbox.run("gpu_smoke.sh", "engine", "--cpu", "--n", "4")
    assert done.returncode == 0, done.stderr
    assert sandbox.calls == ["-m benchmarks.gpu_smoke.engine --cpu --n 4"]
    sandbox.calls_file.unlink()
    assert sandbox.run("gpu_smoke.sh").returncode == 0
    parts = ["-m benchmarks.gpu_smoke.engine", "-m examples.tasks arithmetic", "-m benchmarks.gpu_smoke.loop"]
    assert [call.strip() for call in sandbox.calls] == parts
    wrong = sandbox.run("gpu_smoke.sh", "all")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: there is no part 'all'; it must be engine or loop")


def test_a_part_that_fails_is_told_and_the_next_one_runs(sandbox: Sandbox) -> None:
    sandbox.program(
        sandbox.folder / "venv/bin/python",
        f'printf "%s\\n" "$*" >> {sandbox.calls_file}; [ "$2" != benchmarks.gpu_smoke.engine ]',
    )
    assert sandbox.run("gpu_smoke.sh").returncode == 1 and len(sandbox.calls) == 3


class Cluster:
    """Stand-ins for Slurm's and Ray's programs on three machines."""

    def __init__(self, sandbox: Sandbox, joined: int) -> None:
        self.sandbox, self.log = sandbox, sandbox.folder / "cluster"
        sandbox.program(sandbox.bin / "scontrol", "printf 'a\\nb\\nc\\n'")
        sandbox.program(sandbox.bin / "srun", f'echo "srun $*" >> {self.log}')
        sandbox.program(sandbox.bin / "sleep", "exit 0")
        nodes = "".join(f"echo '\"node_id\": {i},';" for i in range(joined))
        sandbox.program(sandbox.folder / "venv/bin/ray", f'[ "$1" != list ] || {{ {nodes} }}')

    def run(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "[a-c]", "SLURM_GPUS_ON_NODE": "8", **changes}
        return self.sandbox.run("slurm.sh", *arguments, **{key: value for key, value in job.items() if value})

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()


def test_a_slurm_job_trains_on_its_machines(sandbox: Sandbox) -> None:
    cluster = Cluster(sandbox, joined=3)
    done = cluster.run("deepscaler", "--method", "gc2po", RAY_PORT="7000")
    assert done.returncode == 0, done.stderr
    ray = sandbox.folder / "venv/bin/ray"
    head, workers, train, stop = sorted(
        cluster.calls(), key=lambda c: ("stop" in c, "train.sh" in c, "--head" not in c)
    )
    assert head == (
        f"srun --overlap --nodes=1 --ntasks=1 --nodelist=a {ray} start --head --port=7000 --disable-usage-stats --block"
    )
    assert workers == (
        f"srun --overlap --nodes=2 --ntasks=2 --exclude=a {ray} start --address=a:7000 --disable-usage-stats --block"
    )
    assert train.endswith("--nodelist=a bash run_scripts/train.sh deepscaler --method gc2po --nodes 3 --gpus 8")
    assert stop == f"srun --overlap --ntasks-per-node=1 {ray} stop"


def test_machines_that_do_not_join_end_the_job(sandbox: Sandbox) -> None:
    cluster = Cluster(sandbox, joined=2)
    done = cluster.run("deepscaler")
    assert (
        done.returncode == 1
        and "error: only 2 of 3 machines joined Ray's head a:6379 within five minutes" in done.stderr
    )
    assert not any("train.sh" in call for call in cluster.calls()) and cluster.calls()[-1].endswith("ray stop")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"SLURM_JOB_NODELIST": ""}, "this is no Slurm job; submit it with sbatch"),
        ({"SLURM_GPUS_ON_NODE": ""}, "the job has no GPUs; submit it with --gpus-per-node"),
    ],
)
def test_no_slurm_job(sandbox: Sandbox, changes: dict[str, str], sentence: str) -> None:
    done = Cluster(sandbox, joined=3).run("deepscaler", **changes)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {sentence}")
