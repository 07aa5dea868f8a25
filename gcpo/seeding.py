"""Seeds of sampling requests and of random choices: one for each, from the run's seed and what names the request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def request_seed(*parts: Any) -> int:
    """A seed that depends only on ``parts``, so that a request or a choice can be repeated in another run."""
    digest = hashlib.blake2b(json.dumps([str(part) for part in parts]).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def seeded(sampling_params: Mapping[str, Any], seed: int | None, *parts: Any) -> dict[str, Any]:
    """The parameters of a sampling request, with the seed that follows from ``seed`` and ``parts``.

    Args:
        sampling_params: of the request; not changed.
        seed: ``gcpo.seed``; ``None``: the request gets no seed, and the server samples from a generator of its own.
        parts: what distinguishes the request from all others of the run.
    """
    unseeded = {name: value for name, value in sampling_params.items() if name != "seed"}
    return unseeded if seed is None else {**unseeded, "seed": request_seed(seed, *parts)}
