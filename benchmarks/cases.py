"""The cases that all benchmarks run, here and in C++, and patterns that look like learned ones."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["PRUNED", "Case", "load_cases", "random_mask"]

PRUNED = (0.5, 0.7, 0.9)  # shares of the eligible pairs


@dataclass(frozen=True)
class Case:
    """A row of cases.csv: the sizes of one attention call."""

    name: str
    batch: int
    query_heads: int
    key_heads: int
    queries: int
    keys: int
    head_size: int
    value_size: int
    is_causal: bool

    def __str__(self) -> str:
        return (
            f"{self.name}: B{self.batch} H{self.query_heads} N{self.queries} D{self.head_size}"
            f"{' causal' if self.is_causal else ''}"
        )


def load_cases() -> list[Case]:
    """All rows of cases.csv."""
    with Path(__file__).with_name("cases.csv").open() as file:
        return [
            Case(row.pop("name"), is_causal=row.pop("is_causal") == "1", **{key: int(row[key]) for key in row})
            for row in csv.DictReader(file)
        ]


def random_mask(case: Case, pruned: float, generator: torch.Generator) -> Tensor:
    """Kept pairs, bool ``[query_heads, queries, keys]``, as per-layer ranking of learned priors leaves them: some keys
    and the neighbourhood of the diagonal are favoured, and heads differ in density."""
    heads, queries, keys = case.query_heads, case.queries, case.keys
    importance = torch.randn(heads, queries, keys, generator=generator)
    importance += 0.7 * torch.randn(heads, 1, keys, generator=generator)
    importance += 0.3 * torch.randn(heads, 1, 1, generator=generator)
    distance = (torch.arange(queries)[:, None] - torch.arange(keys)).abs()
    importance += 2 * torch.exp(-distance / 4)
    eligible = torch.ones(queries, keys, dtype=torch.bool)
    if case.is_causal:
        eligible = eligible.tril()
    importance[:, ~eligible] = -torch.inf
    kept = round((1 - pruned) * heads * int(eligible.sum()))
    mask = torch.zeros(heads * queries * keys, dtype=torch.bool)
    mask[importance.flatten().topk(kept).indices] = True
    return mask.view(heads, queries, keys)
