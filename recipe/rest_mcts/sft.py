"""Fine-tuning of the policy with verl's SFT trainer, in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gcpo.cpu import is_cpu_profile
from gcpo.faults import RunStoppedError
from gcpo.files import put_in_place
from gcpo.selftraining.settings import SelfTrainingSettings
from gcpo.tools.metrics import read_metrics

CPU = (
    "trainer.device=cpu",
    "model.use_remove_padding=False",
    "+model.override_config.attn_implementation=sdpa",
    "model.enable_gradient_checkpointing=False",
    "engine.use_torch_compile=False",
    "engine.model_dtype=fp32",
    *(f"+engine.mixed_precision.{part}_dtype=fp32" for part in ("param", "reduce", "buffer")),
)
"""What verl's SFT trainer needs on a machine without accelerator."""


def command(settings: SelfTrainingSettings, model: str, data: Path, folder: Path, rows: int, longest: int) -> list[str]:
    """The command of one fine-tuning.

    Args:
        settings: of the run.
        model: that is fine-tuned.
        data: parquet of `recipe.rest_mcts.dataset.TokenDataset`.
        folder: for the checkpoint.
        rows: of the data; verl drops the last batch of an epoch if it is not full.
        longest: row, in tokens.
    """
    batch = min(settings.sft.batch_size, rows - rows % settings.gpus)
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={settings.gpus}"),
        *("-m", "verl.trainer.sft_trainer"),
        f"model.path={model}",
        f"data.train_files={data}",
        "data.custom_cls.path=pkg://recipe.rest_mcts.dataset",
        "data.custom_cls.name=TokenDataset",
        f"data.train_batch_size={batch}",
        f"data.max_length={longest}",
        f"data.max_token_len_per_gpu={max(8192, longest)}",
        "data.num_workers=0",
        f"optim.lr={settings.sft.learning_rate}",
        "engine.strategy=fsdp2",
        f"engine.seed={settings.seed}",
        f"trainer.total_epochs={settings.sft.epochs}",
        f"trainer.n_gpus_per_node={settings.gpus}",
        f"trainer.default_local_dir={folder}",
        "trainer.logger=[file]",
        "trainer.resume_mode=disable",
        "checkpoint.save_contents=[hf_model]",
        f"hydra.run.dir={folder}",
        *(CPU if is_cpu_profile() else ()),
        *settings.sft.overrides,
    ]


def fine_tune(arguments: Sequence[str], folder: Path, policy: Path) -> float:
    """Run a `command` of which ``folder`` is the checkpoint's, and put the model into ``policy``.

    Returns:
        The loss of the last step.

    Raises:
        RunStoppedError: the trainer fails; its log is beside ``folder``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder.with_suffix(".log")
    environment = {**os.environ, "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl")}
    with log.open("wb") as file:
        process = subprocess.Popen(
            arguments, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
    try:
        status = process.wait()
    except BaseException:
        process.terminate()  # torchrun then ends its workers; killed, it would leave them
        process.wait()
        raise
    models = list(folder.glob("global_step_*/huggingface"))
    if status != 0 or len(models) != 1:
        raise RunStoppedError(f"verl's SFT trainer ended with status {status}; its last error is in {log}")
    losses = [metrics["train/loss"] for metrics in read_metrics(folder).values() if "train/loss" in metrics]
    put_in_place(models[0], policy)
    shutil.rmtree(folder)
    return losses[-1]
