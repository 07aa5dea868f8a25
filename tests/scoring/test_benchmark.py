"""``benchmarks.packing`` in small."""

from __future__ import annotations

import argparse
import json
import sys

import pytest

from benchmarks import packing

SMALL = "--rounds 1 --n 3 --draws 2 --length 12 --question 9 --layers 1 --hidden 32 --heads 2 --spread 0".split()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["packing", *SMALL, *arguments])
    packing.main()


def test_results(monkeypatch, tmp_path, capsys) -> None:
    """Tokens are those of the tree, and ratios are dense over packed."""
    monkeypatch.setattr(packing, "memory_apart", lambda side, draws: {"dense": 4 << 20, "packed": 6 << 20}[side])
    run(monkeypatch, "--output", str(tmp_path))
    assert "| n = 3, T = 12, hidden 32, 1 layers | L = 2 |" in capsys.readouterr().out
    entry = json.loads((tmp_path / "packing.json").read_text())
    result = entry["results"]["L = 2"]
    # Six sequences of 9 + 3 * 12 + 8 + 12 tokens. The tree: the question; one block for the contexts of two responses,
    # another one for each of these, and two for the third's; six ends of 12 + 8 + 12.
    assert result["tokens"] == {"dense": 6 * 65, "packed": 9 + 5 * 12 + 6 * 32}
    # 4 * 32 * 32 + 3 * 32 * 85 weights. Pairs: 6 * 65 * 66 / 2, and in the tree those of positions 0 to 8, twice those
    # of 9 to 20, three times those of 21 to 32, six times those of 33 to 64.
    dense, tree = 2 * 12_256 * 390 + 4 * 32 * 12_870, 2 * 12_256 * 261 + 4 * 32 * (45 + 2 * 186 + 3 * 330 + 6 * 1584)
    assert result["FLOP bound"] == pytest.approx(dense / tree, abs=5e-4)
    for kind in ("forward", "with gradient"):
        seconds = result[kind]["seconds"]
        assert result[kind]["ratio"] == pytest.approx(seconds["dense"] / seconds["packed"], rel=0.1)
    assert result["gradient memory, MiB"] == {"dense": 4, "packed": 6} and result["memory ratio"] == 1.5
    assert entry["settings"]["draws"] == [2] and entry["versions"]["torch"]


@pytest.mark.parametrize(
    ("option", "sizes"), [([], [6]), (["--dense-rows", "4"], [4, 2]), (["--dense-rows", "1"], [1] * 6)]
)
def test_rows_of_a_dense_micro_batch(monkeypatch, option: list[str], sizes: list[int]) -> None:
    found = []

    def measure(args: argparse.Namespace, draws: int) -> None:
        model, problem = packing.make_model(args), packing.make_problem(args, draws)
        found.extend(len(values) // 12 for values in packing.dense(model, problem, args))
        raise SystemExit

    monkeypatch.setattr(packing, "measure", measure)
    with pytest.raises(SystemExit):
        run(monkeypatch, *option)
    assert found == sizes


@pytest.mark.parametrize("side", packing.SIDES)
def test_memory(monkeypatch, capsys, side: str) -> None:
    """A number of bytes and nothing else, because another process reads it."""
    run(monkeypatch, "--memory-of", side)
    assert int(capsys.readouterr().out) >= 0


def test_bad_input(monkeypatch, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match="the token budget is 50 and the longest sequence has 65 tokens"):
        run(monkeypatch, "--budget", "50", "--output", str(tmp_path))
    with pytest.raises(SystemExit):
        run(monkeypatch, "--rounds", "0")
    assert "--rounds is 0; it must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, "--dense-rows", "0")
    assert "--dense-rows is 0; it must be at least 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
