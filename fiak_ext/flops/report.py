"""The counts of a model: its layers, their heads, and everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fiak_ext.flops.work import Convention, Work

__all__ = ["NOTHING", "Comparison", "LayerFlops", "ModelFlops"]


@dataclass(frozen=True)
class Comparison:
    """The work of dense attention, and what is executed now in its place; those of parts add up with ``+``."""

    dense: Work
    now: Work

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(self.dense + other.dense, self.now + other.now)

    def reduction(self, convention: Convention) -> float:
        """The share of the dense count that is saved, 0..1; 0 where there was nothing to do.

        Raises:
            ValueError: another name than ``"table1"`` and ``"torch"``.
        """
        dense = self.dense.count(convention)
        return 1 - self.now.count(convention) / dense if dense else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Both counts and the reduction, for each convention by its name."""
        conventions: tuple[Convention, ...] = ("table1", "torch")
        return {
            name: {"dense": self.dense.count(name), "now": self.now.count(name), "reduction": self.reduction(name)}
            for name in conventions
        }


NOTHING = Comparison(Work(), Work())


@dataclass(frozen=True)
class LayerFlops:
    """One attention layer: projections of Q, K and V where they belong to it, QK^T and AV of each head.

    Attributes:
        name: of the module in the model.
        heads: one for each query head.
    """

    name: str
    heads: tuple[Comparison, ...]

    @property
    def total(self) -> Comparison:
        """All heads."""
        return sum(self.heads, NOTHING)


@dataclass(frozen=True)
class ModelFlops:
    """The work of one forward pass.

    Attributes:
        layers: the attention layers, in the order of the model's modules.
        other: everything else, output projections included; the same before and after pruning.
    """

    layers: tuple[LayerFlops, ...]
    other: Work

    @property
    def attention(self) -> Comparison:
        """All attention layers, output projections not included (Appendix D)."""
        return sum((layer.total for layer in self.layers), NOTHING)

    @property
    def model(self) -> Comparison:
        """The whole model."""
        attention = self.attention
        return Comparison(attention.dense + self.other, attention.now + self.other)

    def to_dict(self) -> dict[str, Any]:
        """Layers with their heads, attention and model in both conventions, as plain JSON types."""
        layers = [
            {"name": layer.name, **layer.total.to_dict(), "heads": [head.to_dict() for head in layer.heads]}
            for layer in self.layers
        ]
        return {"layers": layers, "attention": self.attention.to_dict(), "model": self.model.to_dict()}

    def table(self, convention: Convention) -> str:
        """A text table of layers, attention and model in one convention.

        Raises:
            ValueError: another name than ``"table1"`` and ``"torch"``.
        """
        rows = [(layer.name or "attention", layer.total) for layer in self.layers]
        rows += [("all attention", self.attention), ("model", self.model)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{convention:<{width}}  {'dense':>18}  {'now':>18}   saved"]
        for name, x in rows:
            dense, now = x.dense.count(convention), x.now.count(convention)
            lines.append(f"{name:<{width}}  {dense:>18,}  {now:>18,}  {x.reduction(convention):>6.2%}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table("torch")
