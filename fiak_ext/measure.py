"""What every measurement of a model needs: its attention by name, and a model that runs as it does in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from fiak_ext.nn import PriorAttention

__all__ = ["all_attentions", "dense_attentions", "evaluating", "plain_names"]

Value = TypeVar("Value")


def all_attentions(op: str, model: nn.Module) -> dict[str, PriorAttention]:
    """The model's attention modules by their :func:`plain_names`, refused where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, PriorAttention)}
    if not found:
        raise ValueError(f"{op}: model must hold a PriorAttention (got {type(model).__name__} without one)")
    return plain_names(found)


def dense_attentions(op: str, model: nn.Module) -> dict[str, PriorAttention]:
    """The same, refused where one is pruned, too."""
    found = all_attentions(op, model)
    pruned = [name for name, attention in found.items() if attention.is_pruned]
    if pruned:
        raise ValueError(f"{op}: model must not be pruned yet (pruned: {', '.join(map(repr, sorted(pruned)))})")
    return found


def plain_names(named: Mapping[str, Value]) -> dict[str, Value]:
    """Things by the names of modules, without what ``torch.compile`` adds to these."""
    return {
        ".".join(part for part in str(name).split(".") if part != "_orig_mod"): value for name, value in named.items()
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no compiled code inside, every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.compiler.set_stance("force_eager"):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
