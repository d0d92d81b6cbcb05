"""The cases that all benchmarks run, here and in C++, and the masks that they run on.

cases.csv has one row for each attention call. Every case runs on three kinds of masks (:func:`make_mask`); masks of a
causal case are causal. The recorded masks are those of masks/, see masks/README.md.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["MASK_KINDS", "PRUNED", "Case", "load_cases", "load_mask", "make_mask", "recorded_heads", "recorded_pruned"]

PRUNED = (0.5, 0.7, 0.9)  # shares of the eligible pairs
MASK_KINDS = ("uniform", "learned-like", "recorded")

_MASKS = Path(__file__).with_name("masks")


@dataclass(frozen=True)
class Case:
    """A row of cases.csv: the sizes of one attention call, and the recorded mask that fits it best."""

    name: str
    batch: int
    query_heads: int
    key_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    is_causal: bool
    recorded: str

    @property
    def is_decoding(self) -> bool:
        """Whether the queries are the last positions of a longer sequence, which see all of it: nothing to train."""
        return self.queries != self.keys

    def eligible(self, device: torch.device | str = "cpu") -> Tensor:
        """bool ``[queries, keys]``: the pairs that may attend, ``j <= i`` if causal."""
        pairs = torch.ones(self.queries, self.keys, dtype=torch.bool, device=device)
        return pairs.tril() if self.is_causal else pairs

    def __str__(self) -> str:
        heads = str(self.query_heads) + (f"/{self.key_heads}" if self.key_heads != self.query_heads else "")
        length = str(self.queries) + (f"/{self.keys}" if self.is_decoding else "")
        causal = " causal" if self.is_causal else ""
        return f"{self.name}: B{self.batch} H{heads} N{length} D{self.head_dim}{causal}"


def load_cases() -> list[Case]:
    """All rows of cases.csv."""
    with Path(__file__).with_name("cases.csv").open() as file:
        return [
            Case(
                row.pop("name"),
                is_causal=row.pop("is_causal") == "1",
                recorded=row.pop("recorded"),
                **{key: int(row[key]) for key in row},
            )
            for row in csv.DictReader(file)
        ]


def load_mask(name: str, pruned: float) -> Tensor:
    """A recorded mask, bool ``[layers, heads, N, N]``, True where kept.

    Args:
        name: as in masks/README.md, for example ``"vit_fashion_n197"``.
        pruned: one of :func:`recorded_pruned`.

    Raises:
        FileNotFoundError: a mask that was not recorded.
    """
    packed = np.load(_MASKS / f"{name}_{pruned:.0%}.npy".replace("%", ""))
    return torch.from_numpy(np.unpackbits(packed, axis=-1, count=packed.shape[2], bitorder="little").astype(np.bool_))


def recorded_pruned(name: str) -> tuple[float, ...]:
    """The pruned shares that a mask was recorded at, ascending."""
    return tuple(sorted(int(path.stem.removeprefix(f"{name}_")) / 100 for path in _MASKS.glob(f"{name}_*.npy")))


def recorded_heads(mask: Tensor, case: Case, layer: int = 0) -> Tensor:
    """Heads of a recorded mask as a layer of a case, bool ``[query_heads, queries, keys]``.

    Heads are taken in turn over all recorded layers. Longer sequences repeat the recorded ``N`` positions (tiles, which
    keep the local structure; stretching would make blocks); below the diagonal of a causal mask, which is recorded on
    one side only, the upper half of a tile mirrors the lower one. Queries of decoding are the last positions.

    Args:
        mask: as :func:`load_mask` gives it; causal where the case is. The heads are on its device.
        case: the sizes.
        layer: which of a model's layers of this case's heads.
    """
    layers, heads, length, _ = mask.shape
    arange = partial(torch.arange, device=mask.device)
    head = arange(layer * case.query_heads, (layer + 1) * case.query_heads) % (layers * heads)
    first = case.keys - case.queries
    row = arange(first, first + case.queries)[:, None].expand(-1, case.keys) % length
    column = arange(case.keys)[None].expand(case.queries, -1) % length
    if not mask.triu(1).any():
        row, column = torch.maximum(row, column), torch.minimum(row, column)
    pairs = (row * length + column).flatten()
    return mask.flatten(0, 1)[head].flatten(1)[:, pairs].view(-1, case.queries, case.keys) & case.eligible(mask.device)


def make_mask(kind: str, case: Case, pruned: float, generator: torch.Generator) -> Tensor:
    """Kept pairs, bool ``[query_heads, queries, keys]``.

    Args:
        kind: ``"uniform"``: every pair with the same probability. ``"learned-like"``: exactly the asked share, as
            per-layer ranking of learned priors leaves it; some keys and the neighbourhood of the diagonal are favoured,
            and heads differ in density. ``"recorded"``: :func:`recorded_heads` of the case's mask.
        case: the sizes.
        pruned: share of the eligible pairs; if recorded, one of :func:`recorded_pruned`.
        generator: of random masks. A mask of another kind than learned-like is on its device.

    Raises:
        ValueError: another kind.
        FileNotFoundError: a mask that was not recorded.
    """
    device = generator.device
    if kind == "uniform":
        sizes = (case.query_heads, case.queries, case.keys)
        return torch.rand(sizes, generator=generator, device=device).ge(pruned) & case.eligible(device)
    if kind == "learned-like":
        return _learned_like(case, pruned, generator)
    if kind == "recorded":
        return recorded_heads(load_mask(case.recorded, pruned).to(device), case)
    raise ValueError(f"make_mask: kind must be one of {', '.join(MASK_KINDS)} (got {kind!r})")


def _learned_like(case: Case, pruned: float, generator: torch.Generator) -> Tensor:
    heads, queries, keys = case.query_heads, case.queries, case.keys
    importance = torch.randn(heads, queries, keys, generator=generator)
    importance += 0.7 * torch.randn(heads, 1, keys, generator=generator)
    importance += 0.3 * torch.randn(heads, 1, 1, generator=generator)
    distance = (torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)).abs()
    importance += 2 * torch.exp(-distance / 4)
    eligible = case.eligible()
    importance[:, ~eligible] = -torch.inf
    kept = round((1 - pruned) * heads * int(eligible.sum()))
    mask = torch.zeros(heads * queries * keys, dtype=torch.bool)
    mask[importance.flatten().topk(kept, sorted=False).indices] = True
    return mask.view(heads, queries, keys)
