"""Numbers that are compared without math-verify, beside math-verify with exact rules, on generated pairs."""

from __future__ import annotations

import os

import pytest

from benchmarks.grader_pairs import exact, ours, pairs

COUNT = int(os.environ.get("GCPO_GRADER_PAIRS", "1500"))
"""Pairs of a run; ``python -m benchmarks.grader_pairs`` compares 20,010."""
SEED = int(os.environ.get("GCPO_GRADER_SEED", "1"))


def test_numbers_compare_as_math_verify_compares_them():
    different = [
        (pair.truth.text, pair.answer.text, pair.right)
        for pair in pairs(COUNT, SEED)
        if not ours(pair) is exact(pair) is pair.right
    ]
    assert different == []


@pytest.mark.parametrize("form", ["integer", "decimal", "fraction", "a/b", "mixed number", "scientific"])
def test_the_pairs_have_every_form_and_both_verdicts(form):
    found = [pair for pair in pairs(1500, 1) if form in (pair.truth.form, pair.answer.form)]
    assert {pair.right for pair in found} == {True, False}
