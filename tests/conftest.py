"""Fixtures, and the environment that every test runs in."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 model of two layers, with the quick start's tokenizer and chat template."""
    from data_prep.warm_start import Recipe, make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "model"
    recipe = Recipe(hidden_size=32, intermediate_size=48, layers=2, heads=2, initializer_range=0.3)
    tokenizer = make_tokenizer(recipe)
    make_model(recipe, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
