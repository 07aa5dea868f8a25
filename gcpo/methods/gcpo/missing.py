"""Counts of the missing parts of a step: collider draws, targets and references.

Parts that are not needed do not count: groups with equal rewards or a single response, and responses that
``reference.subsample`` did not choose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gcpo.faults import RunStoppedError
from gcpo.methods.gcpo.draws import KINDS, MAX_CAUSES

PARTS = ("draws", "targets", "references")


class NothingValidError(RunStoppedError):
    """A step would train as plain GRPO, because a requested part is missing in all of its groups."""


@dataclass
class Count:
    """The number of requested items, and the number of missing ones."""

    asked: int = 0
    missing: int = 0

    def add(self, asked: int, missing: int) -> None:
        """Add the counts of a group."""
        self.asked += asked
        self.missing += missing

    @property
    def frac(self) -> float:
        """The missing fraction; 0 if nothing was requested."""
        return self.missing / self.asked if self.asked else 0.0


@dataclass
class Missing:
    """Counts over the groups of a step.

    Attributes:
        draws: by kind (``gcpo.methods.gcpo.draws.KINDS``): counts of draws; missing ones failed, are empty or were cut.
        targets: responses without a target of Upsilon.
        references: responses without a causal reference.
        causes: the causes of missing draws in the order of the groups, one line each, with their numbers of draws.
    """

    draws: dict[str, Count] = field(default_factory=lambda: {kind: Count() for kind in KINDS})
    targets: Count = field(default_factory=Count)
    references: Count = field(default_factory=Count)
    causes: Counter[str] = field(default_factory=Counter)

    def add_draws(self, entry: Mapping[str, Any]) -> None:
        """Count the draws of a group from its entry ``gcpo_group``: ``stats`` and ``causes``."""
        stats = entry["stats"]
        for kind, count in self.draws.items():
            asked = int(stats.get(f"{kind}/draws", 0))
            count.add(asked, asked - int(stats.get(f"{kind}/ok", 0)))
        self.causes.update(entry.get("causes", {}))

    @property
    def parts(self) -> dict[str, Count]:
        """Return the counts by part; ``draws`` covers all kinds."""
        draws = Count()
        for count in self.draws.values():
            draws.add(count.asked, count.missing)
        return {"draws": draws, "targets": self.targets, "references": self.references}

    def shares(self) -> dict[str, float]:
        """Return the missing fraction of every requested part.

        For draws it is the largest fraction over the kinds: with preset ``paper`` a group has 8 collider draws
        and 512 generations from them, and no generation without a collider draw.
        """
        shares = {part: count.frac for part, count in self.parts.items() if count.asked}
        if "draws" in shares:
            shares["draws"] = max(count.frac for count in self.draws.values())
        return shares

    def metrics(self) -> dict[str, float]:
        """Return the metrics ``gcpo/missing/*_frac`` of the requested parts."""
        return {f"gcpo/missing/{part}_frac": share for part, share in self.shares().items()}

    def check(self, step: int) -> None:
        """Stop the run if a requested part of the step is completely missing.

        Raises:
            NothingValidError: a part is completely missing; the message has the first causes.
        """
        gone = [
            f"none of the {count.asked} {part}"
            for part, count in self.parts.items()
            if count.asked and count.missing == count.asked
        ]
        if gone:
            raise NothingValidError(
                f"{_and(gone)} that step {step} asked for is valid, and the run must not train as plain GRPO under "
                f"another name; first causes: {self._first_causes()}"
            )

    def warning(self, step: int, max_missing: float) -> str | None:
        """Return a sentence if the missing fraction of a part is above ``max_missing``, else ``None``."""
        above = {part: share for part, share in self.shares().items() if share > max_missing}
        if not above:
            return None
        listed = _and([f"{100 * share:.0f} % of the {part}" for part, share in above.items()])
        return (
            f"gcpo: step {step} lacks {listed} that it asked for, more than gcpo.metrics.max_missing={max_missing:g}; "
            f"first causes: {self._first_causes()}"
        )

    def _first_causes(self) -> str:
        causes = list(self.causes.items())[:MAX_CAUSES]
        return "; ".join(f"{cause}, {number} x" for cause, number in causes) or "no draw reported one"


def _and(parts: Sequence[str]) -> str:
    """Join texts as ``a``, ``a and b`` or ``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
