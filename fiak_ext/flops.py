"""Exact operation counts of attention, dense and pruned: Table 1, whole models, every op; and attention's memory.

Two conventions are in use, and never mixed. Both leave out softmax, scale, normalisation, biases and activations.

``table1``
    Multiplications plus additions, where the first term of a sum costs no addition: ``2n - 1`` for a sum of ``n``
    products (Table 1 and Appendix D of the paper).
``torch``
    2 for every multiply-add (``torch.utils.flop_counter``).

A :class:`Work` gives both. Importing this module registers formulas with ``torch.utils.flop_counter``, so that
``FlopCounterMode`` gives the executed count, in the ``torch`` convention, of every op of ``torch.ops.fiak``, and of
torch's fused CPU attention what torch itself counts from 2.15 on. In multiply-adds, for each batch element and query
head:

* ``prior_attention``: ``D + Dv`` for each pair that neither ``is_causal`` nor ``kv_lens`` hides, whatever its weight.
* ``csr_attention``: ``D + Dv`` for each entry of the pattern that ``kv_lens`` does not hide.
* Their backwards compute the scores again instead of storing them, in two passes. By rows, where the gradient of query
  or weights is wanted: scores, dA and dQ, ``2D + Dv`` for each pair. By columns, where that of key or value is wanted:
  scores, dA, dV and dK, ``2D + 2Dv``. If ``D = Dv``, that makes 7 products of one size; the forward pass has 2, and
  a backward that kept all scores would have 4.
* ``compact_linear``: ``D * Dx`` for each kept row; its backward as much for each of input's and weight's gradient.
* ``compact_kv`` and ``csr_plan``: 0.

Executed means the algorithm, as the scalar kernels run it; what vector kernels add by rounding sizes up to whole
vectors and tiles is not counted. What belongs to a row or a key and not to a pair (delta in backward, ``|k_j|^2`` of
the Gaussian score) is normalisation. ``kv_lens``, ``query_offsets`` and ``keep`` are read where they hold data; tensors
without (fake, meta) count as hiding nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula
from torch.utils.hooks import RemovableHandle

from fiak_ext.calibration import plain_names
from fiak_ext.nn import PriorAttention, PriorAttentionHost
from fiak_ext.pattern import SparsePattern

__all__ = [
    "Comparison",
    "LayerFlops",
    "ModelFlops",
    "Work",
    "attention_cost",
    "attention_memory",
    "model_memory",
    "model_report",
    "pair_flops",
    "peak_memory",
    "table1",
]

Convention = Literal["table1", "torch"]
Method = Literal["dense", "pair", "mixed", "key"]


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


def _linear(rows: int, in_features: int, out_features: int) -> Work:
    return Work(rows * in_features * out_features, rows * out_features if in_features else 0)


def _core(pairs: int, rows: int, head_dim: int, value_dim: int, value_pairs: int | None = None) -> Work:
    """QK^T for `pairs`, then AV for `value_pairs` in `rows` rows that are not empty (steps 2 and 3 of Appendix D)."""
    value_pairs = pairs if value_pairs is None else value_pairs
    return Work(pairs * head_dim + value_pairs * value_dim, pairs + rows * value_dim)


def _eligible(queries: int, keys: int, is_causal: bool) -> int:
    """Pairs (i, j), j <= i if causal."""
    if not is_causal:
        return queries * keys
    seen = min(queries, keys)
    return seen * (seen + 1) // 2 + (queries - seen) * keys


# ---------------------------------------------------------------------------------------------------------------------
# One layer's attention


def table1(
    method: Method,
    *,
    heads: int,
    tokens: int,
    head_dim: int,
    model_dim: int,
    k: float | Fraction | None = None,
    k1: float | Fraction | None = None,
    k2: float | Fraction | None = None,
    version: Literal["printed", "exact"] = "exact",
    av: Literal["dense", "sparse"] = "dense",
    is_causal: bool = False,
    key_pairs: float | Fraction | None = None,
) -> float | Fraction:
    """Table 1 and Appendix D: the cost of a dense layer's attention, or what pruning saves of it.

    Counted are the Q, K and V projections, QK^T and AV of all heads, in the ``table1`` convention, for one input.

    As printed, Table 1 errs: the brackets of mixed pruning must hold ``-k1`` and not ``-2 k1``, and a skipped key and
    value save ``(4Dx - 2) D`` and not ``(2Dx - 3) D``. The exact savings suppose that no row of a head is emptied;
    :func:`attention_cost` counts any pattern.

    Args:
        method: ``"dense"`` gives the cost; ``"pair"`` (Algorithm 1), ``"mixed"`` (Algorithm 2) and ``"key"``
            (Algorithm 3) the saving.
        heads, tokens, head_dim, model_dim: H, N, D and Dx.
        k: the fraction of eligible pairs (``"pair"``) or of keys (``"key"``) that is pruned.
        k1: the fraction of eligible pairs that mixed pruning removes, those of pruned keys included.
        k2: the fraction of keys that mixed pruning removes.
        version: as printed, or exact.
        av: ``"dense"``, the paper's assumption that AV takes every eligible pair of every kept key; ``"sparse"``, AV
            takes the kept pairs, as the kernels do. The same for ``"dense"`` and ``"key"``.
        is_causal: only pairs ``j <= i`` are eligible, ``N(N+1)/2`` instead of ``N^2``.
        key_pairs: the fraction of eligible pairs that belong to pruned keys. That is the fraction of keys unless
            is_causal, where early keys are in more pairs than late ones.

    Returns:
        Exact for ``Fraction`` arguments (an int where it is whole), else a float.

    Raises:
        ValueError: an unknown name, missing or superfluous fractions, a causal or sparse printed formula, or a causal
            saving that depends on ``key_pairs`` without it.
    """
    wanted = {"dense": (), "pair": ("k",), "mixed": ("k1", "k2"), "key": ("k",)}
    for name, choice, choices in (
        ("method", method, tuple(wanted)),
        ("version", version, ("printed", "exact")),
        ("av", av, ("dense", "sparse")),
    ):
        if choice not in choices:
            raise ValueError(f"table1: {name} must be one of {', '.join(choices)} (got {choice!r})")
    fractions = {name: value for name, value in (("k", k), ("k1", k1), ("k2", k2)) if value is not None}
    if set(fractions) != set(wanted[method]):
        raise ValueError(
            f"table1: method {method!r} takes the fractions ({', '.join(wanted[method])}) "
            f"(got ({', '.join(fractions)}))"
        )
    if version == "printed" and (is_causal or av == "sparse"):
        raise ValueError("table1: version must be 'exact' with is_causal or av='sparse', which the paper does not have")
    pairs_gone: Any = {"pair": k, "mixed": k1}.get(method, 0)
    keys_gone: Any = {"mixed": k2, "key": k}.get(method, 0)
    if key_pairs is None:
        if is_causal and (method == "key" or (method == "mixed" and av == "dense")):
            raise ValueError("table1: key_pairs is required where is_causal and keys are pruned (got None)")
        key_pairs = keys_gone
    elif not is_causal and key_pairs != keys_gone:
        raise ValueError(f"table1: key_pairs must be {keys_gone}, as of the keys, unless is_causal (got {key_pairs})")

    pairs = heads * _eligible(tokens, tokens, is_causal)
    features = heads * tokens * head_dim
    d, dx = head_dim, model_dim
    result: Any
    if method == "dense":
        result = pairs * (4 * d - 1) + features * (6 * dx - 4)
    elif method == "pair":
        result = pairs_gone * pairs * (2 * d - 1 if av == "dense" else 4 * d - 1)
    elif version == "printed":
        bracket = keys_gone * (4 * d - 1) if method == "key" else 2 * ((pairs_gone + keys_gone) * d - pairs_gone)
        result = bracket * pairs + (2 * dx - 3) * keys_gone * features
    else:
        if method == "key":
            bracket = key_pairs * (4 * d - 1)
        elif av == "dense":
            bracket = 2 * (pairs_gone + key_pairs) * d - pairs_gone
        else:
            bracket = pairs_gone * (4 * d - 1)
        result = bracket * pairs + (4 * dx - 2) * keys_gone * features
    return int(result) if isinstance(result, Fraction) and result.denominator == 1 else result


def attention_cost(
    pattern: SparsePattern,
    *,
    head_dim: int,
    model_dim: int | None = None,
    value_dim: int | None = None,
    skip_keys: bool = False,
    av: Literal["dense", "sparse"] = "sparse",
    is_causal: bool = False,
) -> list[Work]:
    """What each head of a pruned attention computes for one input: Table 1 for any pattern, in whole numbers.

    Args:
        pattern: the pairs that are kept, in one group; a pattern with all eligible pairs gives the dense cost.
        head_dim: D.
        model_dim: Dx, to count the Q, K and V projections; None leaves them out.
        value_dim: Dv, by default D.
        skip_keys: keys that no query of the head keeps are not projected (mixed and key pruning).
        av: ``"sparse"``, AV takes the kept pairs; ``"dense"``, every eligible pair of every projected key (the paper's
            assumption).
        is_causal: which pairs are eligible, for ``av="dense"``.

    Returns:
        The work of each head.

    Raises:
        ValueError: an unknown ``av``, or a pattern of several groups.
    """
    if av not in ("dense", "sparse"):
        raise ValueError(f"attention_cost: av must be 'dense' or 'sparse' (got {av!r})")
    if pattern.groups != 1:
        raise ValueError(f"attention_cost: pattern must have one group (got {pattern.groups})")
    value_dim = head_dim if value_dim is None else value_dim
    queries, keys = pattern.num_queries, pattern.num_keys
    sizes = pattern.crow_indices.diff().view(pattern.num_heads, queries)
    used = ~pattern.empty_columns()[0]
    works = []
    for h in range(pattern.num_heads):
        pairs, rows, value_pairs = int(sizes[h].sum()), int((sizes[h] > 0).sum()), None
        projected = used[h] if skip_keys else torch.ones_like(used[h])
        if av == "dense":
            seen = projected.cumsum(0)[: queries if is_causal else 0]
            if not is_causal or queries > keys:
                seen = torch.cat([seen, projected.sum().expand(queries - seen.numel())])
            value_pairs, rows = int(seen.sum()), int((seen > 0).sum())
        work = _core(pairs, rows, head_dim, value_dim, value_pairs)
        if model_dim is not None:
            work += _linear(queries, model_dim, head_dim)
            work += _linear(int(projected.sum()), model_dim, head_dim + value_dim)
        works.append(work)
    return works


# ---------------------------------------------------------------------------------------------------------------------
# The ops


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def _values(tensor: Tensor | None) -> list[int] | None:
    return tensor.tolist() if tensor is not None and _readable(tensor) else None


# Pairs, and rows with at least one pair: of each batch element and query head [batch * heads], or only the totals [1]
# where no data says more.
_Counts = tuple[list[int], list[int]]


def _dense_counts(
    query: Tensor, keys: int, is_causal: bool, kv_lens: Tensor | None = None, query_offsets: Tensor | None = None
) -> _Counts:
    batch, heads, queries, _ = query.shape
    lens, offsets = _values(kv_lens), _values(query_offsets)
    if lens is None and offsets is None:
        return [batch * heads * _eligible(queries, keys, is_causal)], [batch * heads * queries if keys else 0]
    lens = [keys] * batch if lens is None else lens
    offsets = [0] * batch if offsets is None else offsets
    pairs, rows = [], []
    for length, offset in zip(lens, offsets, strict=True):
        before = _eligible(offset, length, is_causal)
        pairs += [_eligible(offset + queries, length, is_causal) - before] * heads
        rows += [queries if length else 0] * heads
    return pairs, rows


def _csr_counts(arguments: Mapping[str, Any]) -> _Counts:
    query, crow, col = arguments["query"], arguments["crow_indices"], arguments["col_indices"]
    plan, kv_lens, offsets = (arguments.get(name) for name in ("plan", "kv_lens", "query_offsets"))
    batch, heads, queries, _ = query.shape
    if not batch * heads * queries:
        return [0], [0]
    if not _readable(crow):
        shape = _pattern_shape(crow, heads, queries) if offsets is None else (1, heads, queries)
        return [batch * heads * col.shape[0] // (shape[0] * shape[1])], [batch * heads * queries]
    # A plan's header: magic, bytes, rows, queries of a head (PlanHeader in csrc/kernels/plan/plan.h).
    num_queries = queries if plan is None else int(plan[24:32].view(torch.int64))
    shape = _pattern_shape(crow, heads, num_queries)
    sizes = crow.diff().view(shape)
    lens, first = _values(kv_lens), _values(offsets)
    if lens is None:
        lens = [arguments["key"].shape[2]] * batch  # the pattern may have more keys
    pairs, rows = [], []
    visible = -1
    for b in range(batch):
        if lens[b] != visible:
            visible = lens[b]
            entries = torch.cat([crow.new_zeros(1), (col < visible).cumsum(0)])
            sizes = entries[crow.long()].diff().view(shape)
        start = 0 if first is None else first[b]
        own = sizes[b % shape[0], :, start : start + queries].expand(heads, -1)
        pairs += own.sum(-1).tolist()
        rows += (own > 0).sum(-1).tolist()
    return pairs, rows


def _pattern_shape(crow: Tensor, heads: int, num_queries: int) -> tuple[int, int, int]:
    """Groups, heads of a group (1 where all query heads share a pattern) and rows of the CSR matrix of a call."""
    pattern_heads = (crow.shape[0] - 1) // num_queries
    of_group = heads if pattern_heads % heads == 0 else 1
    return pattern_heads // of_group, of_group, num_queries


def _kept_rows(keep: Tensor) -> list[int]:
    """Kept rows of each head [H]; padding counts where keep cannot be read."""
    return (keep >= 0).sum(1).tolist() if _readable(keep) else [keep.shape[1]] * keep.shape[0]


def _pair_counts(arguments: Mapping[str, Any]) -> _Counts:
    """The pairs of a prior_attention or csr_attention call, or of its backward."""
    if "crow_indices" in arguments:
        return _csr_counts(arguments)
    key = arguments["key"]
    return _dense_counts(arguments["query"], key.shape[2], arguments.get("is_causal", False), arguments.get("kv_lens"))


def _attention_forward(arguments: Mapping[str, Any], counts: _Counts | None = None) -> Work:
    pairs, rows = _pair_counts(arguments) if counts is None else counts
    return _core(sum(pairs), sum(rows), arguments["query"].shape[3], arguments["value"].shape[3])


def _attention_backward(arguments: Mapping[str, Any]) -> int:
    pairs = sum(_pair_counts(arguments)[0])
    head_dim, value_dim = arguments["query"].shape[3], arguments["value"].shape[3]
    grad_query, grad_key, grad_value, grad_weight = arguments["output_mask"]
    by_rows = 2 * head_dim + value_dim if grad_query or grad_weight else 0
    by_columns = 2 * (head_dim + value_dim) if grad_key or grad_value else 0
    return 2 * pairs * (by_rows + by_columns)


def _compact_linear(arguments: Mapping[str, Any]) -> Work:
    keep, weight = arguments["keep"], arguments["weight"]
    head_dim = weight.shape[0] // max(keep.shape[0], 1)
    return _linear(arguments["input"].shape[0] * sum(_kept_rows(keep)), weight.shape[1], head_dim)


def _compact_linear_backward(arguments: Mapping[str, Any]) -> int:
    grad_input, grad_weight, _ = arguments["output_mask"]
    return (grad_input + grad_weight) * _compact_linear(arguments).torch


def _nothing(_: Mapping[str, Any]) -> Work:
    return Work()


_FORWARD: dict[str, Callable[[Mapping[str, Any]], Work]] = {
    "prior_attention": _attention_forward,
    "prior_attention_forward": _attention_forward,
    "csr_attention": _attention_forward,
    "csr_attention_forward": _attention_forward,
    "compact_linear": _compact_linear,
    "compact_kv": _nothing,
    "compact_kv_backward": _nothing,
    "csr_plan": _nothing,
}
_BACKWARD: dict[str, Callable[[Mapping[str, Any]], int]] = {
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


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Q K^T and P V: 2 FLOPs for each multiply-add."""
    return 2 * query.shape[:-1].numel() * key.size(2) * (query.size(3) + value.size(3))


def _sdpa_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> int:
    """Q K^T again, dS K and dS^T Q; dO V^T and P^T dO."""
    return 2 * query.shape[:-1].numel() * key.size(2) * (3 * query.size(3) + 2 * value.size(3))


def _register() -> None:
    def in_torch(forward: Callable[[Mapping[str, Any]], Work]) -> Callable[[Mapping[str, Any]], int]:
        return lambda arguments: forward(arguments).torch

    for op, formula in {**{op: in_torch(forward) for op, forward in _FORWARD.items()}, **_BACKWARD}.items():
        register_flop_formula(getattr(torch.ops.fiak, op), get_raw=True)(_by_name(op, formula))
    # torch before 2.15 counts fused attention on every device but the CPU, and up to 2.11 only with as many key heads.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for aten, count in ((fused, _sdpa), (fused_backward, _sdpa_backward)):
        if aten not in flop_registry:
            register_flop_formula(aten, get_raw=True)(count)


_register()


# ---------------------------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class Comparison:
    """The work of dense attention, and what is executed now in its place."""

    dense: Work
    now: Work

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
        return _total(self.heads)


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
        return _total(layer.total for layer in self.layers)

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


def _total(parts: Iterable[Comparison]) -> Comparison:
    dense, now = Work(), Work()
    for part in parts:
        dense, now = dense + part.dense, now + part.now
    return Comparison(dense, now)


@torch.no_grad()
def model_report(model: nn.Module, *args: Any, **kwargs: Any) -> ModelFlops:
    """What a forward pass of a model with :class:`~fiak_ext.PriorAttention` modules executes, against dense attention.

    Runs ``model(*args, **kwargs)`` once, in evaluation mode. Dense attention takes every pair that neither causality
    nor ``kv_lens`` hides, and projects every key; modules without a pattern are dense. The projections of
    :class:`~fiak_ext.MultiHeadSelfAttention` and of converted attention count for its heads, those of other models as
    part of ``other``. A model without patterns may lie on the meta device.

    Returns:
        The counts for all inputs of the batch together.

    Raises:
        ValueError: a model without PriorAttention, or with a pruned one on the meta device.
        NotImplementedError: an operation that torch counts and that has no count in the ``table1`` convention.
    """
    names: dict[PriorAttention, str] = {}
    for name, module in plain_names(dict(model.named_modules())).items():  # parents come first
        if isinstance(module, PriorAttentionHost):
            names[module.prior_attention] = name
        elif isinstance(module, PriorAttention):
            names.setdefault(module, name)
    if not names:
        raise ValueError(f"model_report: model must hold PriorAttention modules (got {type(model).__name__})")
    for attention, name in names.items():
        crow = attention.pattern_crow_indices
        if crow is not None and not _readable(crow):
            raise ValueError(f"model_report: model must hold the data of its patterns (got {name!r} on {crow.device})")

    run = _Run(names)
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        for module in model.modules():
            for handle in run.watch(module):
                stack.callback(handle.remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())  # of hooks on compiled modules, which do no harm here
        warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
        stack.enter_context(run.counter)
        try:
            model.eval()
            model(*args, **kwargs)
        finally:
            for module in training:
                module.training = True
    layers = [LayerFlops(names[attention], tuple(heads)) for attention, heads in run.heads.items()]
    return ModelFlops(tuple(layers), run.total() - run.inside)


@torch.no_grad()
def pair_flops(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """What each pair of each head costs a forward pass, QK^T and AV, if attention keeps it.

    Runs ``model(*args, **kwargs)`` once, in evaluation mode. The sum over a pattern's pairs and all heads is what
    :func:`model_report` counts for its attention without projections, in the ``torch`` convention.

    Returns:
        For the name of every :class:`~fiak_ext.PriorAttention`, int64 ``[groups, num_queries, num_keys]``: 2 (D + Dv)
        for each batch element that has the pair.
    """
    costs: dict[str, Tensor] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            assert isinstance(module, PriorAttention)
            query, key, value = _named(("query", "key", "value"), args, kwargs)
            cost = 2 * (query.shape[3] + value.shape[3])
            batch, queries = query.shape[0], query.shape[2]
            keys = key.shape[2] if module.keep is None else module.num_keys
            lens, offsets = _values(kwargs.get("kv_lens")), _values(kwargs.get("query_offsets"))
            for b in range(batch):
                start = 0 if offsets is None else offsets[b]
                length = keys if lens is None else lens[b]
                costs[name][b % module.groups, start : start + queries, :length] += cost

        return hook

    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in plain_names(dict(model.named_modules())).items():
            if isinstance(module, PriorAttention):
                costs[name] = torch.zeros(module.groups, module.num_queries, module.num_keys, dtype=torch.int64)
                handle = module.register_forward_pre_hook(count(name), with_kwargs=True)
                stack.callback(handle.remove)
        try:
            model.eval()
            model(*args, **kwargs)
        finally:
            for module in training:
                module.training = True
    return costs


class _Run:
    """One counted forward pass: what each head does, and what of the total lies inside attention."""

    def __init__(self, attentions: Iterable[PriorAttention]) -> None:
        self.heads = {module: [Comparison(Work(), Work())] * module.num_heads for module in attentions}
        self.inside = Work()
        self.counter = FlopCounterMode(display=False)
        registry = {op: _in_work(op, formula) for op, formula in self.counter.flop_registry.items()}
        registry.update(dict.fromkeys(_FUSED_ATTENTION, _fused_attention))
        for op, forward in _FORWARD.items():
            formula = self._record if forward is _attention_forward else forward
            registry[getattr(torch.ops.fiak, op)] = _by_name(op, formula)
        self.counter.flop_registry = registry
        self._executed: _Counts | None = None
        self._before = Work()
        self._hosts: dict[PriorAttention, PriorAttentionHost] = {}
        self._all_keys = False

    def watch(self, module: nn.Module) -> list[RemovableHandle]:
        if isinstance(module, PriorAttentionHost):
            self._hosts[module.prior_attention] = module
            return [module.register_forward_pre_hook(self._before_host, with_kwargs=True)]
        if isinstance(module, PriorAttention):
            return [
                module.register_forward_pre_hook(self._before_attention, with_kwargs=True),
                module.register_forward_hook(self._after_attention, with_kwargs=True),
            ]
        return []

    def total(self) -> Work:
        counts: Any = self.counter.flop_counts["Global"].values()
        return sum(counts, Work())

    def _record(self, arguments: Mapping[str, Any]) -> Work:
        self._executed = _pair_counts(arguments)
        return _attention_forward(arguments, self._executed)

    def _add(self, module: PriorAttention, work: Iterable[Comparison]) -> None:
        self.heads[module] = [_total(pair) for pair in zip(self.heads[module], work, strict=True)]

    def _before_attention(self, module: PriorAttention, args: Any, kwargs: Any) -> None:
        self._before, self._executed = self.total(), None

    def _after_attention(self, module: PriorAttention, args: Any, kwargs: Any, output: Any) -> None:
        self.inside += self.total() - self._before
        query, key, value = _named(("query", "key", "value"), args, kwargs)
        heads, sizes = module.num_heads, (query.shape[3], value.shape[3])
        keys = key.shape[2] if module.keep is None else module.num_keys
        hidden = (kwargs.get("kv_lens"), kwargs.get("query_offsets"))
        pairs, rows = _dense_counts(query, keys, module.is_causal, *hidden)
        dense = _core(sum(pairs) // heads, sum(rows) // heads, *sizes)
        if not module.is_pruned:
            if self._executed is not None:
                pairs, rows = self._executed
            now = [_core(sum(pairs) // heads, sum(rows) // heads, *sizes)] * heads
        else:
            assert self._executed is not None
            pairs, rows = self._executed
            now = [_core(sum(pairs[h::heads]), sum(rows[h::heads]), *sizes) for h in range(heads)]
        self._add(module, [Comparison(dense, work) for work in now])
        host = self._hosts.get(module)
        if host is not None and host.model_dim is not None:
            self._add_projections(module, host.model_dim, query, key.shape[1], value.shape[3])

    def _before_host(self, module: PriorAttentionHost, args: Any, kwargs: Any) -> None:
        self._all_keys = module.projects_all_keys(kwargs)

    def _add_projections(self, module: PriorAttention, dim: int, query: Tensor, key_heads: int, value_dim: int) -> None:
        """Those of the queries' tokens; the keys and values of a key head count for its first query head."""
        batch, heads, tokens, head_dim = query.shape
        kept = [tokens] * key_heads
        if module.keep is not None and not self._all_keys:
            kept = _kept_rows(module.kept(tokens))
        dense, now = [], []
        for head in range(heads):
            own = _linear(batch * tokens, dim, head_dim)
            key_head, place = divmod(head, heads // key_heads)
            rows = [0, 0] if place else [tokens, kept[key_head]]
            all_rows, kept_rows = (own + _linear(batch * count, dim, head_dim + value_dim) for count in rows)
            dense.append(all_rows)
            now.append(kept_rows)
        self._add(module, map(Comparison, dense, now))
        self.inside += sum(now, Work())


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    found = {**dict(zip(names, args, strict=False)), **kwargs}
    return [found[name] for name in names]


_FUSED_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> Work:
    """All pairs, as torch counts fused attention."""
    rows = query.shape[0] * query.shape[1] * query.shape[2]
    return _core(rows * key.shape[2], rows, query.shape[3], value.shape[3])


def _in_work(op: Any, formula: Callable[..., int]) -> Callable[..., Work]:
    """torch's own formula as Work, for the ops whose every output is one sum."""

    def work(*args: Any, out_val: Any = None, **kwargs: Any) -> Work:
        if not isinstance(out_val, Tensor):
            raise NotImplementedError(f"model_report: {op} has no count in the table1 convention")
        products = formula(*args, out_val=out_val, **kwargs) // 2
        return Work(products, out_val.numel() if products else 0)

    return work


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def attention_memory(
    *,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    value_dim: int | None = None,
    pairs: int | None = None,
    element_size: int = 4,
    index_size: int = 4,
) -> dict[str, int]:
    """The buffers, in bytes, of one layer's unfused attention at inference (Figures 2 and 7, "attention only").

    Counted are Q, K, V, the output, and two buffers of scores, before and after softmax. These take, for each batch
    element and head, ``2 * queries * keys`` elements if dense; if pruned, 2 for each kept pair, and the indices of the
    pairs (CSR), which the whole batch shares. The kernels of this package are fused and store no scores;
    :func:`peak_memory` measures what is really held.

    Args:
        batch, heads, queries, keys, head_dim, value_dim: sizes; ``keys`` is the number of keys kept.
        pairs: pairs kept, over all heads; None is dense attention.
        element_size: bytes of an element, 4 for float32.
        index_size: bytes of an index, 4 for int32.

    Returns:
        The size of each buffer by its name; their sum is the peak.
    """
    value_dim = head_dim if value_dim is None else value_dim
    rows = batch * heads
    scores = batch * (heads * queries * keys if pairs is None else pairs) * element_size
    return {
        "query, key, value": rows * (queries * head_dim + keys * (head_dim + value_dim)) * element_size,
        "output": rows * queries * value_dim * element_size,
        "scores": scores,
        "probabilities": scores,
        "indices": 0 if pairs is None else (pairs + heads * queries + 1) * index_size,
    }


def model_memory(
    attention: Mapping[str, int],
    *,
    batch: int,
    tokens: int,
    model_dim: int,
    hidden_dim: int,
    layers: int,
    parameters: int,
    element_size: int = 4,
) -> dict[str, int]:
    """The buffers, in bytes, of a pre-norm transformer at the peak of inference (Figures 2 and 7, "model").

    Counted are the parameters, the indices of all layers, the residual stream and its normalised copy, and the larger
    of one layer's attention buffers and its MLP's two hidden ones, before and after the activation.

    Args:
        attention: one layer's buffers, from :func:`attention_memory`.
        batch, tokens, model_dim, hidden_dim, layers: sizes.
        parameters: number of parameters.
        element_size: bytes of an element, 4 for float32.

    Returns:
        The size of each buffer by its name; their sum is the peak.
    """
    stream = batch * tokens * model_dim * element_size
    indices = attention["indices"]
    return {
        "parameters": parameters * element_size,
        "indices": layers * indices,
        "residual": stream,
        "normalised": stream,
        "attention or MLP": max(sum(attention.values()) - indices, 2 * batch * tokens * hidden_dim * element_size),
    }


def peak_memory(function: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held at once for ``function()``, beyond what it held before.

    Scratch space that kernels allocate by themselves is not seen; what a first call sets up for good is.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    del result
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
