"""Run a training command with a log, metrics and progress display.

``python -m gcpo.tools.launch --output DIR -- COMMAND...`` copies the command's output to
``DIR/train.log``, its metrics to ``DIR/metrics.jsonl``, and shows a bar and one line per step. A second start resumes
the run: verl resumes from its checkpoint, the log and the metrics continue; a complete run is not changed.
"""

from gcpo.tools.launch.command import launch, main
from gcpo.tools.launch.leftovers import LAUNCH_VARIABLE, LaunchError
from gcpo.tools.launch.log import LOG_FILE
from gcpo.tools.launch.state import STATE_FILE, RunState

__all__ = ["LAUNCH_VARIABLE", "LOG_FILE", "STATE_FILE", "LaunchError", "RunState", "launch", "main"]
