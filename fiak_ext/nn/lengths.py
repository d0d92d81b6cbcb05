"""Inputs that are shorter than the longest that a module takes, alike in eager and in compiled code."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["first_of", "may_be_shorter"]


def may_be_shorter(size: int, longest: int) -> bool:
    """Whether an input is shorter than it may be. Compiled code does not look, so that it serves every length."""
    return torch.compiler.is_compiling() or size < longest


def first_of(x: Tensor, dim: int, size: int) -> Tensor:
    """The first ``size`` entries along ``dim``. Compiled code gathers them, as slices ask whether these are all."""
    if torch.compiler.is_compiling():
        return x.index_select(dim, torch.arange(size, device=x.device))
    return x.narrow(dim, 0, size)
