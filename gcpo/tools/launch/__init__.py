"""Runs a training command so that a person can follow it.

``python -m gcpo.tools.launch --output DIR -- COMMAND...`` writes everything that the command prints to
``DIR/train.log``, its metrics to ``DIR/metrics.jsonl``, and shows what it is doing now, a bar, and one line per step.
Started again it goes on: verl resumes from its checkpoint, the log and the metrics are continued; a run that is
complete is left alone.
"""

from gcpo.tools.launch.command import launch, main
from gcpo.tools.launch.display import Display, Eta, PlainDisplay, TerminalDisplay, duration
from gcpo.tools.launch.errors import error_summary
from gcpo.tools.launch.leftovers import LAUNCH_VARIABLE, processes_of
from gcpo.tools.launch.log import LOG_FILE, clean, split_lines
from gcpo.tools.launch.metrics import MetricsTail, join_metrics, keep_earlier_metrics, step_line
from gcpo.tools.launch.progress import Progress
from gcpo.tools.launch.run import Launcher
from gcpo.tools.launch.state import STATE_FILE, LaunchError, RunState, settings_that_differ, wanted_steps

__all__ = [
    "LAUNCH_VARIABLE",
    "LOG_FILE",
    "STATE_FILE",
    "Display",
    "Eta",
    "LaunchError",
    "Launcher",
    "MetricsTail",
    "PlainDisplay",
    "Progress",
    "RunState",
    "TerminalDisplay",
    "clean",
    "duration",
    "error_summary",
    "join_metrics",
    "keep_earlier_metrics",
    "launch",
    "main",
    "processes_of",
    "settings_that_differ",
    "split_lines",
    "step_line",
    "wanted_steps",
]
