"""Fields of the batch, which are names for everything that is not ours."""

from __future__ import annotations

import pickle

import torch

from gcpo.methods.fields import Field


def test_a_field_travels_as_its_name() -> None:
    """TransferQueue and Ray pickle the names of fields; a process that reads them needs nothing of ours."""
    field = Field("gcpo_x", torch.long, "[T]", writer="sample", readers="credit", meaning="A test.")
    name = pickle.loads(pickle.dumps(field))
    assert type(name) is str and name == field and {field: 1}[name] == 1
