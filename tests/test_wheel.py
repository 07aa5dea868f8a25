"""The wheel without the checkout: its commands, its yaml and its checks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import gcpo

ROOT = Path(__file__).parents[1]
MAIN_PPO = ("-m", "verl.trainer.main_ppo", "--config-path", "pkg://gcpo.config", "--config-name", "gcpo_trainer")
SETTINGS = ("device=cpu", "data.train_files=a.parquet", "data.val_files=b.parquet", "actor_rollout_ref.model.path=c")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, and behind it the packages of the environment of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "gcpo", source / "gcpo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True)
    venv.create(folder / "venv")
    (wheel,) = folder.glob("*.whl")
    packages = folder / "venv" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    with zipfile.ZipFile(wheel) as content:
        content.extractall(packages)
    # A path in a .pth file comes after our own wheel, and the .pth files at that path are not read.
    (packages / "zz.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(source)
    return folder / "venv" / "bin" / "python"


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment in an empty folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.slow
def test_the_package_is_the_wheels(installed: Path, tmp_path: Path) -> None:
    """The modules, the yaml files, the marker of type hints and the version come from the wheel."""
    said = run(installed, tmp_path, "-c", "import gcpo; print(gcpo.__file__, gcpo.__version__)")
    file, version = said.stdout.split()
    assert Path(file).is_relative_to(installed.parents[1]) and version == gcpo.__version__
    package = Path(file).parent
    assert (package / "py.typed").is_file()
    for yaml in (ROOT / "gcpo" / "config").rglob("*.yaml"):
        assert (package / yaml.relative_to(ROOT / "gcpo")).read_text() == yaml.read_text()
    assert list(package.parent.glob(f"gcpo-{version}.dist-info"))


@pytest.mark.slow
def test_verls_entry_point_composes_our_yaml(installed: Path, tmp_path: Path) -> None:
    """``pkg://gcpo.config`` is found in the wheel."""
    said = run(installed, tmp_path, *MAIN_PPO, *SETTINGS, "gcpo.kappa=0.5", "--cfg", "job")
    assert said.returncode == 0, said.stderr
    assert "trainer_mode: gcpo" in said.stdout and "kappa: 0.5" in said.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("gcpo.kappa=-1", "gcpo: gcpo.kappa is -1; it must be at least 0"),
        ("+gcpo.conditioned.max_tokens=9", "gcpo: gcpo.conditioned has a new name: write gcpo.regenerated"),
    ],
)
def test_verls_entry_point_refuses_before_ray(installed: Path, tmp_path: Path, override: str, sentence: str) -> None:
    """One sentence and status 2; Ray has not been started."""
    said = run(installed, tmp_path, *MAIN_PPO, *SETTINGS, override)
    assert said.returncode == 2 and said.stderr.splitlines()[-1] == sentence
    assert "Started a local Ray instance" not in said.stdout + said.stderr


@pytest.mark.slow
def test_the_commands_run(installed: Path, tmp_path: Path) -> None:
    """``gcpo doctor`` and ``gcpo cost`` need no file of the checkout."""
    cli = ("-c", "import sys; from gcpo.tools.cli import main; sys.exit(main())")
    cost = run(installed, tmp_path, *cli, "cost", "--config-name", "gcpo_trainer", *SETTINGS[:1])
    assert cost.returncode == 0 and "balanced" in cost.stdout, cost.stderr
    doctor = run(installed, tmp_path, *cli, "doctor")
    assert "Traceback" not in doctor.stderr and "verl" in doctor.stdout
