"""Runs a training command so that a person can follow it.

``python -m gcpo.tools.launch --output DIR -- COMMAND...`` copies everything that the command prints to
``DIR/train.log``, its metrics to ``DIR/metrics.jsonl``, and shows a bar and one line per step. Started again it goes
on: verl resumes from its checkpoint, the log and the metrics are continued; a run that is complete is left alone.
"""

from gcpo.tools.launch.command import launch, main
from gcpo.tools.launch.leftovers import LAUNCH_VARIABLE, LaunchError
from gcpo.tools.launch.log import LOG_FILE
from gcpo.tools.launch.state import STATE_FILE, RunState

__all__ = ["LAUNCH_VARIABLE", "LOG_FILE", "STATE_FILE", "LaunchError", "RunState", "launch", "main"]
