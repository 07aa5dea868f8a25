"""The figure of the README: ``python docs/figures/method.py`` writes ``docs/figures/method.png``."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, PLAIN, CAUSAL = "#1f2933", "#e4e7eb", "#cfe3f7"


def box(ax, x, y, text, color, width=2.1, height=0.72):
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.08", fc=color, ec=INK, lw=1.1)
    )
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5, color=INK)
    return x, y, width, height


def arrow(ax, start, end, label="", bend=0.0, dx=0.0, dy=0.12):
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=12, lw=1.1, color=INK, connectionstyle=f"arc3,rad={bend}"
        )
    )
    if label:
        ax.text((start[0] + end[0]) / 2 + dx, (start[1] + end[1]) / 2 + dy, label, ha="center", fontsize=8.5, color=INK)


def main() -> None:
    figure, ax = plt.subplots(figsize=(10.4, 3.9), dpi=160)
    ax.set_xlim(0, 13)
    ax.set_ylim(0, 4.8)
    ax.axis("off")
    box(ax, 0.1, 3.0, "question q", PLAIN, 1.7)
    box(ax, 2.7, 3.0, "responses\n$y_0 \\ldots y_{n-1}$", PLAIN)
    box(ax, 5.7, 3.0, "rewards → $A_i$", PLAIN)
    box(ax, 10.6, 3.0, "$\\min(R B_i, \\mathrm{clip}\\, B_i)$\n− β KL − κ KL′", PLAIN, 2.3)
    box(ax, 2.55, 1.6, "collider draws\n$y_{n,l}$ from q and all $y$", CAUSAL, 2.4)
    box(ax, 5.7, 1.6, "contexts $x_{i,l}$\nall but $y_i$, with $y_{n,l}$", CAUSAL, 2.1)
    box(ax, 8.4, 2.15, "Υ$_i$: is $y_i$ near\n$\\bar Z_i - \\bar Z'_i + \\bar z$ ?", CAUSAL, 2.1)
    box(ax, 8.3, 0.75, "reference $\\pi'_{ref}$\n$= p_c -$ mean $p_l + p_q$", CAUSAL, 2.5)
    arrow(ax, (1.82, 3.36), (2.66, 3.36), "π_old")
    arrow(ax, (4.82, 3.36), (5.66, 3.36))
    arrow(ax, (7.82, 3.42), (10.56, 3.42), "$B_i = A_i Υ_i$", dy=0.12)
    arrow(ax, (3.75, 2.96), (3.75, 2.36), "π_old", dx=0.4, dy=-0.05)
    arrow(ax, (4.97, 1.96), (5.66, 1.96))
    arrow(ax, (7.82, 2.1), (8.36, 2.4), "states", dx=-0.05, dy=0.17)
    arrow(ax, (7.82, 1.8), (8.26, 1.25), "log-probs", dx=-0.42, dy=-0.3)
    arrow(ax, (9.45, 2.9), (9.45, 3.38))
    arrow(ax, (10.84, 1.1), (11.7, 2.96), "κ", bend=0.25, dx=0.45)
    ax.text(0.1, 4.25, "GRPO", fontsize=11, color=INK, weight="bold")
    ax.text(0.1, 1.85, "added by GCPO", fontsize=11, color="#2b6cb0", weight="bold")
    figure.savefig(Path(__file__).with_suffix(".png"), bbox_inches="tight")


if __name__ == "__main__":
    main()
