"""Fixtures, and the environment that every test runs in."""

from __future__ import annotations

import os
import signal
import subprocess

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray starts its workers with a low priority, with which they would wait for the tests of the other processes.
os.environ.setdefault("RAY_worker_niceness", "0")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 model of two layers, with the quick start's tokenizer and chat template."""
    from examples.arithmetic.warm_start import Recipe, make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "model"
    recipe = Recipe(hidden_size=32, intermediate_size=48, layers=2, heads=2, initializer_range=0.3)
    tokenizer = make_tokenizer(recipe)
    make_model(recipe, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    """The tokenizer of ``tiny_model``, as a run loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def recipe_config() -> Callable[..., Any]:
    """``recipe_config(*overrides)``: what ``python -m recipe.gcpo.main_gcpo *overrides`` is given."""
    from tests.run_inputs import composed, with_overrides

    def make(*overrides: str, name: str = "gcpo_trainer") -> Any:
        # Hydra takes half a second for the groups and milliseconds for the rest.
        groups = [text for text in overrides if "." not in text.partition("=")[0]]
        return with_overrides(composed(name, *groups), *(text for text in overrides if text not in groups))

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def run_inputs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with ``model``, ``train.parquet`` and ``test.parquet``; see ``tests/run_inputs.py``."""
    from tests.run_inputs import make_inputs

    return make_inputs(tmp_path_factory.mktemp("run"), tiny_model)


@pytest.fixture
def default_hangup() -> Iterator[None]:
    """SIGHUP has its default meaning for processes that the test starts; under `nohup` they would ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


SLOW = (
    "adapters/test_checkpoint",
    "adapters/test_counts",
    "adapters/test_driver_memory",
    "adapters/test_gc2po",
    "adapters/test_gvpo",
    "adapters/test_l2t",
    "adapters/test_l2t_penalty",
    "adapters/test_objective",
    "adapters/test_padding_free",
    "adapters/test_perturbed",
    "adapters/test_probe",
    "adapters/test_scoring",
    "adapters/test_stability",
    "adapters/test_threads",
    "cpu/test_patches",
    "data_prep/test_broken_rows",
    "golden/test_golden",
    "rewards/test_code",
    "rewards/test_math_limits",
    "rewards/test_sandbox",
    "test_docs",
    "test_entry_points",
    "test_gpu_smoke",
    "test_padding_free_benchmark",
    "test_races",
    "test_scripts",
    "tools/compare/test_compare",
    "tools/groups/test_page",
    "tools/test_launch",
    "tools/test_launch_full_disk",
    "tools/test_launch_leftovers",
)
"""Modules whose tests start ranks, sandboxes or interpreters of their own; single tests are marked where they stand."""


STACK = ("tests/end_to_end/", "tests/test_races.py", "tests/tools/test_launch")
"""Modules that start Ray or look at the processes of the machine; they run first, one after the other. Two at
once are each about half as fast on two cores, and Ray then does not always start in time."""
WITHOUT_RAY = ("tests/end_to_end/test_rest_mcts.py",)
"""Modules in folders of `STACK` that need not wait for the others."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `SLOW`."""
    for item in items:
        module = item.path.relative_to(ROOT / "tests").with_suffix("").as_posix()
        if module in SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not in_stack(item.nodeid))


def in_stack(nodeid: str) -> bool:
    """Whether a test runs after, and not beside, the others of `STACK`."""
    return nodeid.startswith(STACK) and not nodeid.startswith(WITHOUT_RAY)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a module, and those of all modules of `STACK`, in one process of ``pytest -n``."""
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "stack" if in_stack(nodeid) else nodeid.partition("::")[0]

    return ByModule(config, log)
