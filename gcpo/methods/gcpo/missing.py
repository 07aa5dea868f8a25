"""The parts of a step that were asked for and are not there: collider draws, targets and references.

Groups that are left out on purpose ask for nothing: all rewards equal, a single response, responses that
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
    """A step would train as plain GRPO, because a part that was asked for is missing in all of its groups."""


@dataclass
class Count:
    """How many were asked for, and how many of them are missing."""

    asked: int = 0
    missing: int = 0

    def add(self, asked: int, missing: int) -> None:
        """Add the counts of a group."""
        self.asked += asked
        self.missing += missing

    @property
    def frac(self) -> float:
        """The share that is missing; 0 where nothing was asked for."""
        return self.missing / self.asked if self.asked else 0.0


@dataclass
class Missing:
    """Counts over the groups of a step.

    Attributes:
        draws: by kind (``gcpo.methods.gcpo.draws.KINDS``): draws that failed, are empty or were cut.
        targets: responses without a target of Upsilon.
        references: responses without a causal reference.
        causes: one line for every cause of a missing draw, in the order of the groups, each with its number of draws.
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
        """The counts by part; ``draws`` over all kinds."""
        draws = Count()
        for count in self.draws.values():
            draws.add(count.asked, count.missing)
        return {"draws": draws, "targets": self.targets, "references": self.references}

    def shares(self) -> dict[str, float]:
        """The missing share of every part that was asked for.

        Of the draws it is the share of the kind that lost the most: with preset ``paper`` a group has 8 collider draws
        and 512 generations after them, and without the former there are none of the latter.
        """
        shares = {part: count.frac for part, count in self.parts.items() if count.asked}
        if "draws" in shares:
            shares["draws"] = max(count.frac for count in self.draws.values())
        return shares

    def metrics(self) -> dict[str, float]:
        """``gcpo/missing/*_frac``, for the parts that were asked for."""
        return {f"gcpo/missing/{part}_frac": share for part, share in self.shares().items()}

    def check(self, step: int) -> None:
        """Stop a step in which a part that was asked for is missing altogether.

        Raises:
            NothingValidError: with the first causes.
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
        """A sentence where the missing share of a part is above ``max_missing``, else ``None``."""
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
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
