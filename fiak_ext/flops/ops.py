"""What each op of ``torch.ops.fiak`` and torch's fused attention computes, as ``FlopCounterMode`` asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from fiak_ext.flops.pairs import PairCounts, count_pairs, kept_rows
from fiak_ext.flops.work import Work, attention_work, linear_work

__all__ = ["work_formulas"]

# ---------------------------------------------------------------------------------------------------------------------
# torch.ops.fiak; the formulas take the arguments of a call by name


def _attention(arguments: Mapping[str, Any], on_pairs: Callable[[PairCounts], None] = lambda counts: None) -> Work:
    counts = count_pairs(arguments)
    on_pairs(counts)
    pairs, rows = counts
    return attention_work(sum(pairs), sum(rows), arguments["query"].shape[3], arguments["value"].shape[3])


def _attention_backward(arguments: Mapping[str, Any]) -> int:
    pairs = sum(count_pairs(arguments)[0])
    head_dim, value_dim = arguments["query"].shape[3], arguments["value"].shape[3]
    grad_query, grad_key, grad_value, grad_prior = arguments["output_mask"]
    by_rows = 2 * head_dim + value_dim if grad_query or grad_prior else 0
    by_columns = 2 * (head_dim + value_dim) if grad_key or grad_value else 0
    return 2 * pairs * (by_rows + by_columns)


def _compact_linear(arguments: Mapping[str, Any]) -> Work:
    keep, weight = arguments["keep"], arguments["weight"]
    head_dim = weight.shape[0] // max(keep.shape[0], 1)
    return linear_work(arguments["input"].shape[0] * sum(kept_rows(keep)), weight.shape[1], head_dim)


def _compact_linear_backward(arguments: Mapping[str, Any]) -> int:
    grad_input, grad_weight, _ = arguments["output_mask"]
    return (grad_input + grad_weight) * _compact_linear(arguments).torch


def _nothing(_: Mapping[str, Any]) -> Work:
    return Work()


_WORK: dict[str, Callable[[Mapping[str, Any]], Work]] = {
    "prior_attention": _attention,
    "prior_attention_forward": _attention,
    "csr_attention": _attention,
    "csr_attention_forward": _attention,
    "compact_linear": _compact_linear,
    "compact_kv": _nothing,
    "compact_kv_backward": _nothing,
    "csr_plan": _nothing,
    "csr_plan_summary": _nothing,
}
_FLOPS: dict[str, Callable[[Mapping[str, Any]], int]] = {  # in the torch convention alone
    "prior_attention_backward": _attention_backward,
    "csr_attention_backward": _attention_backward,
    "compact_linear_backward": _compact_linear_backward,
}


def _by_name(op: str, formula: Callable[[Mapping[str, Any]], Any]) -> Callable[..., Any]:
    """The formula as torch's counter calls it, with the arguments that the op got."""
    names = [argument.name for argument in getattr(torch.ops.fiak, op).default._schema.arguments]

    def call(*args: Any, out_val: Any = None, **kwargs: Any) -> Any:
        return formula({**dict(zip(names, args, strict=False)), **kwargs})

    return call


# ---------------------------------------------------------------------------------------------------------------------
# torch's fused attention; it counts all pairs, as torch itself does

_FUSED_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Work:
    rows = query.shape[:-1].numel()
    return attention_work(rows * key.shape[2], rows, query.shape[3], value.shape[3])


def _fused_attention_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> int:
    """Q K^T again, dS K and dS^T Q; dO V^T and P^T dO."""
    return 2 * query.shape[:-1].numel() * key.shape[2] * (3 * query.shape[3] + 2 * value.shape[3])


# ---------------------------------------------------------------------------------------------------------------------
# Registration


def work_formulas(
    registry: Mapping[Any, Callable[..., int]], on_pairs: Callable[[PairCounts], None]
) -> dict[Any, Callable[..., Work]]:
    """Formulas that make a ``FlopCounterMode`` count :class:`Work`, so that one run gives both conventions.

    Args:
        registry: the counter's own formulas, which count in the ``torch`` convention.
        on_pairs: called with the pairs of each ``prior_attention`` and ``csr_attention``.
    """
    formulas = {op: _in_work(op, formula) for op, formula in registry.items()}
    formulas.update(dict.fromkeys(_FUSED_ATTENTION, _fused_attention))
    for op, work in _WORK.items():
        formula = partial(work, on_pairs=on_pairs) if work is _attention else work
        formulas[getattr(torch.ops.fiak, op)] = _by_name(op, formula)
    return formulas


def _in_work(op: Any, formula: Callable[..., int]) -> Callable[..., Work]:
    """torch's own formula as Work, for the ops whose every output is one sum."""

    def work(*args: Any, out_val: Any = None, **kwargs: Any) -> Work:
        if not isinstance(out_val, Tensor):
            raise NotImplementedError(f"model_report: {op} has no count in the table1 convention")
        products = formula(*args, out_val=out_val, **kwargs) // 2
        return Work(products, out_val.numel() if products else 0)

    return work


def _in_torch(work: Callable[..., Work]) -> Callable[..., int]:
    """The formula in the ``torch`` convention."""
    return lambda *args, **kwargs: work(*args, **kwargs).torch


def _register() -> None:
    for op, formula in {**{op: _in_torch(work) for op, work in _WORK.items()}, **_FLOPS}.items():
        register_flop_formula(getattr(torch.ops.fiak, op), get_raw=True)(_by_name(op, formula))
    # torch before 2.15 counts fused attention on every device but the CPU, and up to 2.11 only with as many key heads.
    for aten, count in (
        (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, _in_torch(_fused_attention)),
        (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, _fused_attention_backward),
    ):
        if aten not in flop_registry:
            register_flop_formula(aten, get_raw=True)(count)


_register()
