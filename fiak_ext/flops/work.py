"""The work of matrix products, in the two conventions of counting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Convention", "Work", "attention_work", "linear_work"]

Convention = Literal["table1", "torch"]


@dataclass(frozen=True)
class Work:
    """Multiplications and the sums that their products go into; counts of parts add up with ``+`` and ``sum``.

    Attributes:
        products: multiplications, which is also the number of multiply-adds (MACs).
        sums: sums with at least one term.
    """

    products: int = 0
    sums: int = 0

    @property
    def table1(self) -> int:
        """Multiplications and additions, ``products + (products - sums)``."""
        return 2 * self.products - self.sums

    @property
    def torch(self) -> int:
        """2 for every multiply-add."""
        return 2 * self.products

    def count(self, convention: Convention) -> int:
        """The count in one of the conventions.

        Raises:
            ValueError: another name.
        """
        if convention not in ("table1", "torch"):
            raise ValueError(f"Work.count: convention must be 'table1' or 'torch' (got {convention!r})")
        return self.table1 if convention == "table1" else self.torch

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.sums + other.sums)

    def __radd__(self, other: int) -> Work:
        return self if other == 0 else NotImplemented

    def __sub__(self, other: Work) -> Work:
        return Work(self.products - other.products, self.sums - other.sums)


def linear_work(rows: int, in_features: int, out_features: int) -> Work:
    """A linear layer, for ``rows`` rows."""
    return Work(rows * in_features * out_features, rows * out_features if in_features else 0)


def attention_work(pairs: int, rows: int, head_dim: int, value_dim: int, value_pairs: int | None = None) -> Work:
    """QK^T and AV (steps 2 and 3 of Appendix D).

    Args:
        pairs: pairs with a score.
        rows: rows with at least one pair for AV.
        head_dim, value_dim: D and Dv.
        value_pairs: pairs that AV takes, by default ``pairs``.
    """
    value_pairs = pairs if value_pairs is None else value_pairs
    return Work(pairs * head_dim + value_pairs * value_dim, pairs + rows * value_dim)
