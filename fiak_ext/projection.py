"""Projections to query, key and value where attention needs some rows of key and value only.

A layer is taken for its weights where it is exactly a linear layer that nothing has been done to: then the rows that
nobody needs are not computed (``ops.compact_linear``). Any other layer (LoRA, quantised, pruned by
``torch.nn.utils.prune``, parametrized, offloaded, with hooks) is called on all rows, as in the model that it comes
from, and the rows that are needed are taken from what it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fiak_ext import ops

__all__ = ["Weights", "is_plain_linear", "project_kept", "project_qkv", "register_linear"]


class Weights(NamedTuple):
    """Weight ``[out_features, in_features]`` and bias of a linear map, as ``F.linear`` takes them.

    By themselves, a projection that is no layer: ``torch.nn.MultiheadAttention`` holds the weights of its own.
    """

    weight: Tensor
    bias: Tensor | None


Projection: TypeAlias = nn.Module | Weights

# Classes of layers that are no more than their weights, and how to get these.
_LINEAR: dict[type[nn.Module], Callable[[Any], Weights]] = {nn.Linear: lambda layer: Weights(layer.weight, layer.bias)}


def register_linear(layer_class: type[nn.Module], weights: Callable[[Any], Weights]) -> None:
    """Declares that layers of exactly this class compute ``F.linear(x, *weights(layer))`` and no more."""
    _LINEAR[layer_class] = weights


def is_plain_linear(layer: Projection) -> bool:
    """Whether a layer is no more than its weights, so that these may be used without calling it.

    It is of exactly a class that is known to be linear (``nn.Linear``, transformers' ``Conv1D``): no subclass, as
    parametrizations make one. It has no hooks and no forward of its own, which is what accelerate, FSDP,
    ``torch.nn.utils.prune`` and ``weight_norm`` add. Its weight and bias are ordinary dense floating-point tensors, not
    of a subclass as torchao's and DTensor are. Hooks on all modules alike (``register_module_forward_hook``) do not
    count.
    """
    return _plain_weights(layer) is not None


def project_kept(
    layer: Projection,
    x: Tensor,
    keep: Tensor,
    *,
    head_dim: int | None = None,
    owner: nn.Module | None = None,
) -> Tensor:
    """Rows ``keep`` of a projection to key or value: ``x [B, n, dim]`` to ``[B, H, K, D]``.

    Args:
        layer: maps ``[B, n, dim]`` to ``[B, n, H * D]``.
        x: the tokens.
        keep: int64 ``[H, K]``, the rows of each head, ascending, all below n; rows of zeros where it is -1.
        head_dim: D, where it is known.
        owner: the module that holds the layer, to name it in errors.

    Raises:
        ValueError: a layer whose result has another shape, or whose weight is not where ``x`` is.
    """
    weights = _plain_weights(layer)
    if weights is None:
        rows = _call(layer, x, keep.size(0), head_dim, owner).unflatten(2, (keep.size(0), -1)).transpose(1, 2)
        return _take(rows, keep)
    _check_width(layer, weights.weight.size(0), keep.size(0), head_dim, owner)
    _check_device(layer, weights.weight, x, owner)
    return ops.compact_linear(x, weights.weight, weights.bias, keep)


def project_qkv(
    layer: Projection,
    x: Tensor,
    num_heads: int,
    keep: Tensor | None = None,
    *,
    head_dim: int | None = None,
    owner: nn.Module | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value by one projection, of all rows or, of key and value, of the rows ``keep``.

    Args:
        layer: maps ``[B, n, dim]`` to ``[B, n, 3 * num_heads * D]``: queries of all heads, keys, values.
        x: the tokens.
        num_heads: of query, key and value.
        keep: as for :func:`project_kept`, or None for all rows.
        head_dim, owner: as for :func:`project_kept`.

    Returns:
        query ``[B, num_heads, n, D]``; key and value ``[B, num_heads, K or n, D]``.

    Raises:
        ValueError: as :func:`project_kept`.
    """
    weights = None if keep is None else _plain_weights(layer)
    if keep is None or weights is None:
        heads = _call(layer, x, 3 * num_heads, head_dim, owner).unflatten(2, (3, num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return (query, key, value) if keep is None else (query, _take(key, keep), _take(value, keep))
    weight, bias = weights
    _check_width(layer, weight.size(0), 3 * num_heads, head_dim, owner)
    _check_device(layer, weight, x, owner)
    width = weight.size(0) // 3
    query_bias, other_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    query = F.linear(x, weight[:width], query_bias).unflatten(2, (num_heads, -1)).transpose(1, 2)
    key, value = ops.compact_linear(x, weight[width:], other_bias, keep.repeat(2, 1)).chunk(2, 1)
    return query, key, value


def _plain_weights(layer: Projection) -> Weights | None:
    """The weights, as ``F.linear`` takes them, of a layer that is no more than them."""
    if isinstance(layer, Weights):
        weights = layer
    else:
        weights_of = _LINEAR.get(type(layer))
        if weights_of is None or _is_changed(layer):
            return None
        weights = weights_of(layer)
    return weights if all(tensor is None or _is_ordinary(tensor) for tensor in weights) else None


def _is_changed(layer: nn.Module) -> bool:
    """Whether calling the layer does more, or something else, than its class says."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return "forward" in layer.__dict__ or any(len(kind) > 0 for kind in hooks)


def _is_ordinary(tensor: Tensor) -> bool:
    # FakeTensor and FunctionalTensor stand for ordinary tensors while a model is traced.
    plain = type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, (FakeTensor, FunctionalTensor))
    return plain and tensor.layout == torch.strided and tensor.is_floating_point()


def _call(layer: Projection, x: Tensor, heads: int, head_dim: int | None, owner: nn.Module | None) -> Tensor:
    if (weights := _plain_weights(layer)) is not None:
        _check_device(layer, weights.weight, x, owner)
    output = F.linear(x, *layer) if isinstance(layer, Weights) else layer(x)
    if not isinstance(output, Tensor) or output.dim() != 3 or output.shape[:2] != x.shape[:2]:
        what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{_place(layer, owner)}: output must be a Tensor [{x.size(0)}, {x.size(1)}, features], that of a linear "
            f"layer (got {what}): replace the layer by one that gives it"
        )
    _check_width(layer, output.size(2), heads, head_dim, owner)
    return output


def _check_width(layer: Projection, width: int, heads: int, head_dim: int | None, owner: nn.Module | None) -> None:
    # Up to torch 2.13, compiled code does not find a number in a tuple of symbolic sizes that has it.
    if width % heads or (head_dim is not None and head_dim != width // heads):
        size = "as many" if head_dim is None else str(head_dim)
        raise ValueError(
            f"{_place(layer, owner)}: output must have {size} features for each of {heads} heads (got {width} in "
            "all): replace the layer by one of this size; attention cannot be split over devices by heads"
        )


def _check_device(layer: Projection, weight: Tensor, x: Tensor, owner: nn.Module | None) -> None:
    if weight.device != x.device:
        raise ValueError(
            f"{_place(layer, owner)}: weight must be on {x.device}, where the input is (got {weight.device}): move the "
            "model there, or let hooks on the layer bring it (accelerate's cpu_offload)"
        )


def _place(layer: Projection, owner: nn.Module | None) -> str:
    """What errors call a layer: its name in the attention module and its class."""
    if isinstance(layer, Weights):
        name = "in_proj_weight"
    else:
        modules = [] if owner is None else owner.named_modules()
        name = next((name for name, module in modules if module is layer), type(layer).__name__)
        name = name if name == type(layer).__name__ else f"{name} ({type(layer).__name__})"
    return name if owner is None else f"{type(owner).__name__}.{name}"


def _take(rows: Tensor, keep: Tensor) -> Tensor:
    """Rows ``keep [H, K]`` of ``rows [B, H, n, D]``, zeros where it is -1."""
    keep = keep[None, :, :, None]
    taken = rows.gather(2, keep.clamp(min=0).expand(rows.size(0), -1, -1, rows.size(3)))
    return taken.masked_fill(keep < 0, 0)
