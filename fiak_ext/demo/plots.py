"""Pictures like the paper's Figure 3: what each head of each layer has learned, and what pruning leaves of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from torch import Tensor

__all__ = ["save_picture"]

_PANEL = 1.35  # inches
_SHOWN: dict[str, Any] = {"vmin": 0, "aspect": "auto", "interpolation": "nearest"}


def save_picture(path: Path, title: str, priors: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> None:
    """Draws the priors of a model and, to the right of them, the pairs that are kept in black; writes a PNG file.

    Every panel is a head: queries i go downwards, keys j to the right.

    Args:
        path: of the file.
        title: above everything.
        priors: ``[num_heads, N, M]`` of each layer, not negative. All share one scale, which ends where one pair in
            200 lies above it.
        masks: bool ``[num_heads, N, M]`` of each layer, True where kept; None before pruning.
    """
    layers, heads = len(priors), len(priors[0])
    columns = heads if masks is None else 2 * heads + 1  # one stays empty, between both halves
    widths = [1.0] * columns
    if masks is not None:
        widths[heads] = 0.35
    figure = Figure(figsize=(_PANEL * sum(widths) + 1.3, _PANEL * layers + 1.0), dpi=120)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        layers, columns, width_ratios=widths, left=0.06, right=0.90, top=1 - 0.75 / figure.get_figheight(), bottom=0.05
    )
    top = max(float(torch.cat([prior.flatten() for prior in priors]).float().quantile(0.995)), 1e-12)

    for layer in range(layers):
        for head in range(heads):
            axes = _panel(figure, grid[layer, head], layer, head)
            shown = axes.imshow(priors[layer][head].float().numpy(), vmax=top, cmap="magma", **_SHOWN)
            if masks is not None:
                mask = masks[layer][head]
                axes = _panel(figure, grid[layer, heads + 1 + head], layer, head)
                axes.imshow(mask.numpy(), vmax=1, cmap="binary", **_SHOWN)
                axes.set_xlabel(f"{mask.float().mean():.0%} kept", fontsize=7, labelpad=2)
    scale = figure.add_axes((0.925, 0.15, 0.012, 0.6))
    figure.colorbar(shown, cax=scale, extend="max").ax.tick_params(labelsize=7)
    scale.set_title(r"$|\pi_{ij}|$", fontsize=9)
    height = figure.get_figheight()
    what = r"$|\pi_{ij}|$" if masks is None else r"$|\pi_{ij}|$ (left) and the pairs kept (right, black)"
    figure.text(0.48, 1 - 0.22 / height, title, fontsize=11, ha="center", va="center")
    figure.text(
        0.48, 1 - 0.44 / height, f"{what}; query i downwards, key j to the right", fontsize=8, ha="center", va="center"
    )
    figure.savefig(path)


def _panel(figure: Figure, place: SubplotSpec, layer: int, head: int) -> Axes:
    """An empty plot of a head: queries downwards, keys to the right."""
    axes = figure.add_subplot(place)
    axes.set_xticks([])
    axes.set_yticks([])
    if layer == 0:
        axes.set_title(f"head {head + 1}", fontsize=8, pad=3)
    if head == 0:
        axes.set_ylabel(f"layer {layer + 1}", fontsize=8)
    return axes
