"""Theorem 1 and Corollary 2 of GCPO on two colliders whose expectations are exact: linear-Gaussian and binary.

``python -m benchmarks.theory`` compares predictors f of y_0 from x = {q, y_1, ..., y_n}, with risk E[(y_0 - f)^2].
Theorem 1: the projection removes the error |Phi f - pi*(q)|^2 from f. Corollary 2: it gains |Psi f*|^2 - |Psi f -
Psi f*|^2 over pi*(q), which can be negative. The command prints tables and writes ``theory.json`` and ``theory.png``.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import arguments, interval, print_table, save
from gcpo.algorithms import causal_target

PREDICTORS = ("optimum", "joint answer alone", "joint answer believed")
STRENGTHS = np.geomspace(0.1, 10, 60)
CORRELATIONS = np.linspace(0, 1, 60)
DRAWS = (1, 2, 4, 8, 16, 32)


class Collider(ABC):
    """A question with independent responses y_0, ..., y_{n-1} and their joint answer y_n, which is the collider.

    A random variable is a vector; ``weights`` define the inner product E[g h].

    Attributes:
        n: number of responses.
        variables: [n + 1, coordinates], y_0 to y_n.
        weights: [coordinates].
    """

    n: int
    variables: np.ndarray
    weights: np.ndarray

    @abstractmethod
    def expectation(self, f: np.ndarray, given: Sequence[int]) -> np.ndarray:
        """Return E[f | q, y_k for k in ``given``]."""

    @abstractmethod
    def believed(self) -> np.ndarray:
        """Return E[y_0 | x] of a model that takes y_n for free of noise."""

    def square(self, f: np.ndarray) -> float:
        """Return E[f^2]."""
        return float(self.weights @ f**2)

    def risk(self, f: np.ndarray) -> float:
        """Return E[(y_0 - f)^2]."""
        return self.square(self.variables[0] - f)

    def prior(self) -> np.ndarray:
        """Return pi*(q) = E[y_0 | q]."""
        return self.expectation(self.variables[0], [])

    def predictor(self, name: str) -> np.ndarray:
        """Return E[y_0 | x], E[y_0 | q, y_n] or `believed`, for a name of ``PREDICTORS``."""
        if name == "joint answer believed":
            return self.believed()
        return self.expectation(self.variables[0], [self.n] if "alone" in name else range(1, self.n + 1))

    def psi(self, f: np.ndarray) -> np.ndarray:
        """Return Psi f = f - E[f | q, y_1, ..., y_{n-1}] (Eq. 2)."""
        return f - self.expectation(f, range(1, self.n))

    def projected(self, f: np.ndarray, draws: float = np.inf) -> float:
        """Return the risk of Psi f + pi*(q), with Phi f as the mean over ``draws`` leave-one-out draws of y_n.

        Given y_1, ..., y_{n-1}, the draws are independent of y_0 and y_n, so that their mean adds |Psi f|^2 / L.
        """
        return self.risk(self.psi(f) + self.prior()) + self.square(self.psi(f)) / draws

    def shared(self, f: np.ndarray, draws: int, *, inclusive: bool = True) -> float:
        """Return the risk of the target with ``draws`` shared draws, as printed (Step 3), or without the draw l = 0.

        Given all responses, the draws have the same distribution. Their difference is noise, which y_0 does not enter.
        """
        noise = self.square(f - self.expectation(f, range(self.n)))
        return self.risk(self.prior()) + noise * (1 - 1 / draws if inclusive else 1 + 1 / (draws - 1))

    def removed(self, f: np.ndarray, draws: float = np.inf) -> float:
        """Return the error that the projection removes (Theorem 1)."""
        return self.risk(f) - self.projected(f, draws)

    def gain(self, f: np.ndarray, draws: float = np.inf) -> float:
        """Return the gain of the projection over pi*(q) (Corollary 2)."""
        return self.risk(self.prior()) - self.projected(f, draws)


class Gaussian(Collider):
    """y_k ~ N(mean, 1) and y_n = sum_k strength_k y_k + N(0, 1).

    A vector holds the coefficients of 1, of the deviations of y_0, ..., y_{n-1} and of the noise of y_n, which are
    orthonormal.

    Args:
        strength: [n], or one value for all responses.
        n: number of responses.
        mean: E[y_k | q].
    """

    def __init__(self, strength: float | Sequence[float], n: int, mean: float = 0.0) -> None:
        self.n, self.strength = n, np.broadcast_to(np.asarray(strength, dtype=float), n)
        responses = np.hstack([np.full((n, 1), mean), np.eye(n), np.zeros((n, 1))])
        joint = self.strength @ responses + np.eye(n + 2)[-1]
        self.variables, self.weights = np.vstack([responses, joint]), np.ones(n + 2)

    def expectation(self, f: np.ndarray, given: Sequence[int]) -> np.ndarray:
        """Return the projection onto 1 and the given variables, which is the conditional expectation here."""
        known = np.vstack([np.eye(self.n + 2)[:1], self.variables[list(given)]])
        return known.T @ np.linalg.lstsq(known.T, f, rcond=None)[0]

    def believed(self) -> np.ndarray:
        """Return (y_n - sum_{k >= 1} strength_k y_k) / strength_0."""
        return (self.variables[-1] - self.strength[1:] @ self.variables[1:-1]) / self.strength[0]


class Binary(Collider):
    """y_k ~ Bernoulli(p), for example right or wrong; y_n is their majority with probability (1 + strength) / 2.

    A vector holds the values in all 2^(n + 1) outcomes.

    Args:
        strength: from 0 (y_n is a coin) to 1 (y_n is the majority).
        n: odd number of responses.
        p: E[y_k | q].
    """

    def __init__(self, strength: float, n: int, p: float = 0.5) -> None:
        self.n, self.p = n, p
        outcomes = np.array(list(itertools.product((0, 1), repeat=n + 1)))
        responses, joint = outcomes[:, :n], outcomes[:, n]
        agrees = joint == (responses.sum(1) > n / 2)
        self.variables = outcomes.T.astype(float)
        self.weights = np.where(responses, p, 1 - p).prod(1) * np.where(agrees, 1 + strength, 1 - strength) / 2

    def expectation(self, f: np.ndarray, given: Sequence[int]) -> np.ndarray:
        """Return the mean over the outcomes with the same given values; 0 where they have probability 0."""
        code = sum((self.variables[k].astype(int) << at for at, k in enumerate(given)), np.zeros(len(f), int))
        mass = np.bincount(code, self.weights)
        return np.divide(np.bincount(code, self.weights * f), mass, out=np.zeros(len(mass)), where=mass > 0)[code]

    def believed(self) -> np.ndarray:
        """Return y_n where it decides the majority, that is where y_1, ..., y_{n-1} tie, and elsewhere p."""
        tied = self.variables[1:-1].sum(0) == (self.n - 1) / 2
        return np.where(tied, self.variables[-1], self.p)


def simulate(strength: float, n: int, name: str, draws: int, groups: int = 20_000) -> dict[str, tuple[float, float]]:
    """Return the risk of the targets of `gcpo.algorithms.causal_target` on sampled groups of a Gaussian collider.

    pi*(q), which the theorems use, replaces the mean of the group. The seed is the number of draws.

    Returns:
        ``leave_one_out``, ``inclusive`` and, for two draws or more, ``exclusive``: mean and half-width of the 95 %
        interval over groups.
    """
    g = torch.Generator().manual_seed(draws)
    slope = Gaussian(strength, n).predictor(name)[-1]  # of y_n; the noise of y_n enters f only through y_n
    y = torch.randn(n, groups, generator=g, dtype=torch.float64)
    others = y.sum(0) - y

    def features(joint: torch.Tensor) -> torch.Tensor:
        """[n, draws, 1, groups] predictions without the terms of the other responses, which cancel in the target."""
        return slope * joint[:, :, None]

    noise, fresh, fresh_noise = torch.randn(3, n, draws, groups, generator=g, dtype=torch.float64)
    shared = features((strength * y.sum(0) + noise[:1]).expand(n, draws, groups))
    leave_one_out = features(strength * (others[:, None] + fresh) + fresh_noise)
    targets = {
        "leave_one_out": causal_target(y, shared[:, :1], z_marginal=leave_one_out)[0],
        "inclusive": causal_target(y, shared)[0],
    }
    if draws > 1:
        targets["exclusive"] = causal_target(y, shared, projection="exclusive")[0]
    return {kind: interval(((y - t + y.mean(0)) ** 2).mean(0).tolist()) for kind, t in targets.items()}


def compare(collider: Collider) -> dict[str, dict[str, float | None]]:
    """Return risks, the removed error, the gain and the draws that these need, for every predictor.

    With L leave-one-out draws, the removed error is positive if L > ``draws_removed`` = |Psi f|^2 / ``removed``, and
    the gain if L > ``draws_gain`` = |Psi f|^2 / ``gain``; ``None``: for no L.
    """
    table: dict[str, dict[str, float | None]] = {}
    for name in PREDICTORS:
        f = collider.predictor(name)
        removed, gain, size = collider.removed(f), collider.gain(f), collider.square(collider.psi(f))
        table[name] = {"risk": collider.risk(f), "projected": collider.projected(f), "removed": removed, "gain": gain}
        for key, value in (("removed", removed), ("gain", gain)):
            table[name][f"draws_{key}"] = size / value if value > 1e-12 else None
    return table


def plot(simulated: dict[int, dict[str, Any]], path: Path) -> None:
    """Draw the removed error, the risk with L draws, and Corollary 2 on both colliders."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.4), dpi=140, layout="tight")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    for at, n in enumerate((2, 4, 8, 16)):
        models = [Gaussian(s, n) for s in STRENGTHS]
        for draws, style in ((np.inf, "-"), (1, ":")):
            values = [model.removed(model.predictor(PREDICTORS[1]), draws) for model in models]
            first.plot(STRENGTHS, values, style, color=f"C{at}", label=f"n = {n}" if style == "-" else None)
    first.set(xscale="log", xlabel="strength s", ylabel="removed error")
    first.set_title(f"Theorem 1, Gaussian, {PREDICTORS[1]}\n(dotted: one leave-one-out draw)", fontsize=10)

    model = Gaussian(1, 8)
    f = model.predictor("optimum")
    lines = {
        "leave_one_out": ("leave-one-out draws", [model.projected(f, k) for k in DRAWS]),
        "inclusive": ("shared draws, as printed", [model.shared(f, k) for k in DRAWS]),
        "exclusive": ("shared draws, exclusive", [model.shared(f, k, inclusive=False) for k in DRAWS[1:]]),
    }
    for at, (kind, (label, values)) in enumerate(lines.items()):
        second.plot(DRAWS[-len(values) :], values, color=f"C{at}", label=label)
        dots = {k: found[kind] for k, found in simulated.items() if kind in found}
        second.errorbar(list(dots), *zip(*dots.values(), strict=True), fmt="o", ms=3.5, color=f"C{at}")
    second.axhline(model.risk(model.prior()), color="gray", ls="--", lw=1, label="π*(q)")
    second.axhline(model.risk(f), color="black", ls="--", lw=1, label="π*(x)")
    second.set(xscale="log", xticks=DRAWS, xticklabels=DRAWS, xlabel="draws L", ylabel="risk of the target")
    second.set_title("Gaussian, optimum, n = 8, s = 1\n(dots: gcpo.algorithms.causal_target on samples)", fontsize=10)

    for axis, xs, models, title in (
        (third, STRENGTHS, [Gaussian(s, 8) for s in STRENGTHS], "Corollary 2, Gaussian, n = 8"),
        (fourth, CORRELATIONS, [Binary(s, 5) for s in CORRELATIONS], "Corollary 2, binary, n = 5, p = 0.5"),
    ):
        for name in PREDICTORS:
            axis.plot(xs, [model.gain(model.predictor(name)) for model in models], label=name)
        axis.axhline(0, color="gray", lw=0.8)
        axis.set(xlabel="strength s", ylabel="gain over π*(q)")
        axis.set_title(f"{title}\n(fails below 0)", fontsize=10)
    third.set(xscale="log", ylim=(-1.05, 1.05))
    for axis, place in ((first, "upper left"), (second, (0.5, 0.2)), (third, "upper left"), (fourth, "upper left")):
        axis.legend(fontsize=8, loc=place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Command line."""
    args = arguments(__doc__, "outputs/theory", model=False).parse_args()
    simulated = {draws: simulate(1, 8, "optimum", draws) for draws in DRAWS}
    tables = {f"Gaussian, n = {n}, s = {s:g}": compare(Gaussian(s, n)) for n in (2, 8) for s in (0.5, 1, 2)}
    tables |= {f"binary, n = 5, p = {p}, s = {s}": compare(Binary(s, 5, p)) for p in (0.5, 0.8) for s in (0.25, 0.75)}
    save(args.output / "theory.json", {"tables": tables, "simulated": {"groups": 20_000, "risk": simulated}})
    plot(simulated, args.output / "theory.png")
    columns = ("risk", "projected", "removed", "gain", "draws_removed", "draws_gain")
    print_table(
        ["collider", "predictor f", *columns],
        *(
            [at, name, *("–" if row[key] is None else f"{row[key]:.3f}" for key in columns)]
            for at, table in tables.items()
            for name, row in table.items()
        ),
    )
    cells = {k: [found.get(kind) for kind in simulated[2]] for k, found in simulated.items()}
    print_table(
        ["draws", *simulated[2]],
        *([k, *(f"{one[0]:.3f} ± {one[1]:.3f}" if one else "–" for one in row)] for k, row in cells.items()),
    )


if __name__ == "__main__":
    main()
