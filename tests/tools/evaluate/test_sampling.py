"""Why vLLM did not start, in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from gcpo.tools.evaluate.sampling import start_failure

LOG = """\
(EngineCore pid=14440) INFO 11-27 17:48:10 [core.py:120] Initializing a V1 LLM engine
(VllmWorker-0 pid=14454) ERROR 11-27 17:48:10 [multiproc_executor.py:953]     raise ValueError(
(VllmWorker-0 pid=14454) ERROR 11-27 17:48:10 [multiproc_executor.py:953] ValueError: Available memory is too small.
(EngineCore pid=14440) ERROR 11-27 17:48:13 [core.py:1510] EngineCore failed to start.
(EngineCore pid=14440) ERROR 11-27 17:48:13 [core.py:1510] Exception: WorkerProc failed. See stack trace for root cause.
"""
"""As vLLM writes it, shortened."""
ELSEWHERE = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")


@pytest.mark.parametrize(
    ("error", "log", "reason"),
    [
        (ELSEWHERE, LOG, "ValueError: Available memory is too small."),
        (ELSEWHERE, LOG.replace("ValueError:", "torch.OutOfMemoryError:"), "torch.OutOfMemoryError: Available memory"),
        (ELSEWHERE, "", "Engine core initialization failed."),
        (ValueError("no such model\nin 3 lines"), LOG, "no such model"),
    ],
)
def test_the_reason(tmp_path: Path, error: Exception, log: str, reason: str) -> None:
    file = tmp_path / "vllm.log"
    file.write_text(log)
    found = start_failure(error, file)
    assert found.startswith(reason) and "\n" not in found
