"""Dropping what a pruned model no longer needs."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from fiak_ext.nn import PriorAttentionHost

__all__ = ["compact"]

Model = TypeVar("Model", bound=nn.Module)


def compact(model: Model) -> Model:
    """Drops the key and value projections of positions that no query keeps, head by head.

    These are the keys that Algorithms 2 and 3 prune, and the columns that pair pruning (Algorithm 1) happens to leave
    empty. Outputs change by rounding only, parameters stay as they are, and the model can be fine-tuned further; it
    cannot be pruned again.

    Args:
        model: holds :class:`~fiak_ext.MultiHeadSelfAttention` modules, attention that ``convert`` has put priors into,
            or other :class:`~fiak_ext.PriorAttentionHost` modules, all pruned and none compacted; changed in place.

    Returns:
        The model itself.

    Raises:
        ValueError: a model without such modules, or with one that is not pruned or is compacted already; the model is
            then left as it was.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, PriorAttentionHost)}
    if not found:
        raise ValueError(
            "compact: model must hold MultiHeadSelfAttention, converted attention or other PriorAttentionHost modules "
            f"(got {type(model).__name__})"
        )
    for name, module in found.items():
        attention = module.prior_attention
        if attention.is_compacted:
            raise ValueError(f"compact: model must not be compacted already (got {name!r} compacted)")
        if not attention.is_pruned:
            raise ValueError(f"compact: model must be pruned first (got {name!r} not pruned)")
    for module in found.values():
        module.compact()
    return model
