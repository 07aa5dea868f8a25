"""A resumed engine has the weights of its checkpoint, and hands those to the rollout."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.adapters.ranks import build_engine, full, run_on_ranks


def save_and_load(rank: int, world: int, path: str, folder: str) -> tuple[bool, bool, bool]:
    trained = build_engine(path)
    with torch.no_grad():
        for parameter in trained.module.parameters():
            parameter.add_(0.25)
    trained.save_checkpoint(folder, global_step=3)
    resumed = build_engine(path)
    before = {n: full(p.detach()) for n, p in resumed.module.named_parameters()}
    resumed.load_checkpoint(folder)
    after = {n: full(p.detach()) for n, p in resumed.module.named_parameters()}
    wanted = {n: full(p.detach()) for n, p in trained.module.named_parameters()}
    sent = dict(resumed.get_per_tensor_param()[0])
    tied = {n: t for n, t in sent.items() if n in wanted}
    return (
        any(not torch.equal(before[n], wanted[n]) for n in wanted),
        all(torch.equal(after[n], wanted[n]) for n in wanted),
        bool(tied) and all(torch.equal(full(t), wanted[n].to(t.dtype)) for n, t in tied.items()),
    )


def test_weights_survive_a_resume(tiny_model: Path, tmp_path: Path) -> None:
    """Save, build anew, load: the weights are the saved ones, and so is what goes to vLLM."""
    assert run_on_ranks(1, save_and_load, str(tiny_model), str(tmp_path / "actor")) == [(True, True, True)]
