"""What ``prune`` was asked to do and did: numbers for programs, a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Counts", "HeadReport", "LayerReport", "PruningReport"]

_TABLE_HEADER = (
    "layer",
    "pairs",
    "asked",
    "gone",
    "left",
    "by head",
    "keys gone",
    "empty rows",
    "empty keys",
    "dead rows",
)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What pruning was asked to do and did, to a head, a layer or a model.

    A pair is eligible where its query can see its key (j <= i where causal), its row is not in ``prune``'s
    ``dead_rows`` and, on a calibrated model, calibration reached it.

    Attributes:
        pairs: eligible pairs.
        asked: eligible pairs to be gone at the end; None without an amount, or where ``scope`` sets no budget
            at this level.
        pruned: eligible pairs that are gone, those of pruned keys included.
        kept: entries of the resulting pattern.
        unreached: pairs that a query can see but calibration never reached, which are not in ``pairs`` and ``pruned``.
        dead: pairs of the rows in ``prune``'s ``dead_rows``, all gone, which are in none of the above.
        density: share of the eligible pairs that is left, 0..1.
        keys_asked, keys_pruned: keys to be pruned whole, and keys that were.
        empty_rows: queries left without a key, dead ones included; their output is 0.
        empty_columns: keys left without a query, pruned ones included.
        dead_rows: rows that cannot reach the loss: those of ``prune``'s ``dead_rows`` or, without, rows whose prior
            never moved; None where nothing can be said.
    """

    pairs: int
    asked: int | None
    pruned: int
    kept: int
    unreached: int
    dead: int
    density: float
    keys_asked: int
    keys_pruned: int
    empty_rows: int
    empty_columns: int
    dead_rows: int | None


@dataclass(frozen=True, kw_only=True)
class HeadReport(Counts):
    """One head of one pattern group.

    Attributes:
        group, head: which one.
        dead_ranges: the dead rows as half-open ranges (start, stop).
    """

    group: int
    head: int
    dead_ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class LayerReport(Counts):
    """One ``PriorAttention``.

    Attributes:
        name: its name in ``model.named_modules()``, "" where the model itself is one.
        heads: its heads, group by group.
        density_by_length: for inputs of 1, 2, ... keys, the share of the pairs of such an input that is left, of all
            pairs that a query can see: what attention really computes there. An input is as many queries long in
            self-attention (as many queries as keys), and has all queries elsewhere.
    """

    name: str
    heads: tuple[HeadReport, ...]
    density_by_length: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class PruningReport(Counts):
    """The whole model; ``str(report)`` is a table with a line per layer.

    Attributes:
        amount, keys, scope, keep_diagonal: the arguments of ``prune``; with ``target_flops``, the amount it found.
        importance: "prior", "posterior", "gradient", "random" or "tensor".
        target_flops: the argument of ``prune``.
        flops: the share of the dense model's operations that is left, for the example; None without ``target_flops``.
        layers: the layers in the order of ``model.named_modules()``.
        density_by_length: of all layers together; empty where their numbers of keys differ.
    """

    amount: float | None
    keys: float
    scope: str
    importance: str
    keep_diagonal: bool
    target_flops: float | None
    flops: float | None
    layers: tuple[LayerReport, ...]
    density_by_length: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of the report as dicts, lists, numbers and strings, ready for ``json.dumps``."""
        plain = _plain(asdict(self))
        assert isinstance(plain, dict)
        return plain

    def __str__(self) -> str:
        lines = [_TABLE_HEADER, *(_table_line(layer.name or "(model)", layer, layer.heads) for layer in self.layers)]
        lines.append(_table_line("total", self, [head for layer in self.layers for head in layer.heads]))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join([f"{line[0]:<{widths[0]}}", *map(str.rjust, line[1:], widths[1:])]) for line in lines]

        amount = "keys only" if self.amount is None else f"amount {self.amount:g}"
        diagonal = ", diagonal kept" if self.keep_diagonal else ""
        text = [f"{amount}, keys {self.keys:g}, scope {self.scope}, importance {self.importance}{diagonal}", *table]
        if self.flops is not None:
            text.append(f"{self.flops:.2%} of the dense model's operations are left (asked: {self.target_flops:.2%}).")
        if self.density_by_length:
            last = len(self.density_by_length)
            lengths = sorted({max(1, last * quarter // 4) for quarter in (1, 2, 3, 4)})
            shares = ", ".join(f"{length}: {self.density_by_length[length - 1]:.1%}" for length in lengths)
            text.append(f"Left of the pairs of an input, by its length: {shares}.")
        if self.unreached:
            text.append(f"{self.unreached} pairs that calibration did not reach count towards nothing.")
        if self.dead:
            text.append(f"{self.dead} pairs of rows that cannot reach the loss are gone and count towards nothing:")
        elif self.dead_rows:
            text.append("Dead rows (their prior never moved, so most likely they cannot reach the loss):")
        text += [f"  {layer.name or '(model)'}: {_dead_text(layer)}" for layer in self.layers if layer.dead_rows]
        return "\n".join(text)


def total(parts: Sequence[Counts], asked: int | None) -> dict[str, Any]:
    """The fields of :class:`Counts`, summed over parts."""
    names = ("pairs", "pruned", "kept", "unreached", "dead", "keys_asked", "keys_pruned", "empty_rows", "empty_columns")
    sums = {name: sum(getattr(part, name) for part in parts) for name in names}
    dead_rows = [part.dead_rows for part in parts if part.dead_rows is not None]
    return {
        **sums,
        "asked": asked,
        "density": density(sums["pairs"], sums["pruned"]),
        "dead_rows": sum(dead_rows) if dead_rows else None,
    }


def density(pairs: int, pruned: int) -> float:
    """The share that is left; 0 of nothing."""
    return (pairs - pruned) / pairs if pairs else 0.0


def ranges(mask: Tensor) -> tuple[tuple[int, int], ...]:
    """The True stretches of mask [n] as half-open ranges."""
    padded = torch.nn.functional.pad(mask.to(torch.int8), (1, 1))
    edges = padded.diff().nonzero()[:, 0].tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _table_line(name: str, counts: Counts, heads: Sequence[HeadReport]) -> tuple[str, ...]:
    def number(value: int | None) -> str:
        return "-" if value is None else str(value)

    low, high = min(head.density for head in heads), max(head.density for head in heads)
    share = (f"{counts.density:.2%}", f"{low:.1%}..{high:.1%}")
    rest = (counts.keys_pruned, counts.empty_rows, counts.empty_columns, counts.dead_rows)
    return (name, number(counts.pairs), number(counts.asked), number(counts.pruned), *share, *map(number, rest))


def _dead_text(layer: LayerReport) -> str:
    """ "rows 1-196 of heads 0-3": heads with the same dead rows are named together."""
    heads_of: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for index, head in enumerate(layer.heads):
        if head.dead_ranges:
            heads_of.setdefault(head.dead_ranges, []).append(index)
    texts = []
    for dead_ranges, heads in heads_of.items():
        mask = torch.zeros(len(layer.heads), dtype=torch.bool)
        mask[heads] = True
        texts.append(f"rows {_range_text(dead_ranges)} of heads {_range_text(ranges(mask))}")
    return "; ".join(texts)


def _range_text(bounds: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{start}-{stop - 1}" if stop - start > 1 else str(start) for start, stop in bounds)
