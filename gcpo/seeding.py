"""Seeds of sampling requests and random choices, each derived from the run's seed and the request's identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def request_seed(*parts: Any) -> int:
    """Return a seed that depends only on ``parts``, so that another run can repeat the request or choice."""
    digest = hashlib.blake2b(json.dumps([str(part) for part in parts]).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def seeded(sampling_params: Mapping[str, Any], seed: int | None, *parts: Any) -> dict[str, Any]:
    """Return the parameters of a sampling request with the seed derived from ``seed`` and ``parts``.

    Args:
        sampling_params: parameters of the request; not changed.
        seed: ``gcpo.seed``; ``None``: the request gets no seed, and the server uses its own random generator.
        parts: values that identify the request within the run.
    """
    unseeded = {name: value for name, value in sampling_params.items() if name != "seed"}
    return unseeded if seed is None else {**unseeded, "seed": request_seed(seed, *parts)}
