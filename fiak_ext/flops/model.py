"""What a forward pass of a model executes, attention layer by attention layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from fiak_ext.flops.ops import work_formulas
from fiak_ext.flops.pairs import PairCounts, count_dense_pairs, has_data, kept_rows, read
from fiak_ext.flops.report import NOTHING, Comparison, LayerFlops, ModelFlops
from fiak_ext.flops.work import Work, attention_work, linear_work
from fiak_ext.measure import evaluating, plain_names
from fiak_ext.nn import PriorAttention, PriorAttentionHost

__all__ = ["model_report", "pair_flops"]


@torch.no_grad()
def model_report(model: nn.Module, *args: Any, **kwargs: Any) -> ModelFlops:
    """What a forward pass of a model with :class:`~fiak_ext.PriorAttention` modules executes, against dense attention.

    Runs ``model(*args, **kwargs)`` once, in evaluation mode. Dense attention takes every pair that neither causality
    nor ``kv_lens`` hides, and projects every key; modules without a pattern are dense. The projections of a
    :class:`~fiak_ext.PriorAttentionHost` that says its ``model_dim`` (:class:`~fiak_ext.MultiHeadSelfAttention`, most
    converted attention) count for its heads, those of other models as part of ``other``. A model without patterns may
    lie on the meta device.

    Returns:
        The counts for all inputs of the batch together.

    Raises:
        ValueError: a model without PriorAttention, or with a pruned one on the meta device.
        NotImplementedError: an operation that torch counts and that has no count in the ``table1`` convention.
    """
    run = _Run()
    with evaluating(model), ExitStack() as stack:
        for name, module in plain_names(dict(model.named_modules())).items():  # hosts come before what they hold
            for handle in run.watch(name, module):
                stack.callback(handle.remove)
        if not run.names:
            raise ValueError(f"model_report: model must hold PriorAttention modules (got {type(model).__name__})")
        for attention, name in run.names.items():
            crow = attention.pattern_crow_indices
            if crow is not None and not has_data(crow):
                raise ValueError(
                    f"model_report: model must hold the data of its patterns (got {name!r} on {crow.device})"
                )
        stack.enter_context(warnings.catch_warnings())  # of hooks on compiled modules, which do no harm here
        warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
        stack.enter_context(run.counter)
        model(*args, **kwargs)
    layers = [LayerFlops(name, tuple(run.heads[attention])) for attention, name in run.names.items()]
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
        def hook(attention: PriorAttention, args: Any, kwargs: Any) -> None:
            query, key, value = _named(("query", "key", "value"), args, kwargs)
            cost = 2 * (query.shape[3] + value.shape[3])
            batch, queries = query.shape[0], query.shape[2]
            lens, offsets = read(kwargs.get("kv_lens")), read(kwargs.get("query_offsets"))
            for b in range(batch):
                start = 0 if offsets is None else offsets[b]
                length = _num_keys(attention, key) if lens is None else lens[b]
                costs[name][b % attention.groups, start : start + queries, :length] += cost

        return hook

    with evaluating(model), ExitStack() as stack:
        for name, module in plain_names(dict(model.named_modules())).items():
            if isinstance(module, PriorAttention):
                costs[name] = torch.zeros(module.groups, module.num_queries, module.num_keys, dtype=torch.int64)
                stack.callback(module.register_forward_pre_hook(count(name), with_kwargs=True).remove)
        model(*args, **kwargs)
    return costs


class _Run:
    """One counted forward pass.

    Attributes:
        names: each attention, and the name of the module to report it by: its host, which projects for it, or itself.
        heads: the work of each head.
        inside: what of the counter's total belongs to heads.
        counter: counts Work instead of FLOPs.
    """

    def __init__(self) -> None:
        self.names: dict[PriorAttention, str] = {}
        self.heads: dict[PriorAttention, list[Comparison]] = {}
        self.inside = Work()
        self.counter = FlopCounterMode(display=False)
        self.counter.flop_registry = work_formulas(self.counter.flop_registry, self._on_pairs)
        self._executed: PairCounts | None = None
        self._before = Work()
        # Of the host that runs: the features of its tokens, None where its projections count as other, and whether it
        # projects all keys.
        self._projections: dict[PriorAttention, tuple[int | None, bool]] = {}

    def watch(self, name: str, module: nn.Module) -> list[RemovableHandle]:
        """Counts for a module, if it is attention or a host, until the handles are removed."""
        if isinstance(module, PriorAttentionHost):
            attention = module.prior_attention
            self.names[attention] = name
            handles = [module.register_forward_pre_hook(self._before_host, with_kwargs=True)]
        elif isinstance(module, PriorAttention):
            attention = module
            self.names.setdefault(attention, name)
            handles = [
                module.register_forward_pre_hook(self._before_attention, with_kwargs=True),
                module.register_forward_hook(self._after_attention, with_kwargs=True),
            ]
        else:
            return []
        self.heads[attention] = [NOTHING] * attention.num_heads
        return handles

    def total(self) -> Work:
        """All that was counted so far."""
        counts: Any = self.counter.flop_counts["Global"].values()
        return sum(counts, Work())

    def _on_pairs(self, counts: PairCounts) -> None:
        self._executed = counts

    def _add(self, attention: PriorAttention, work: Iterable[Comparison]) -> None:
        self.heads[attention] = [a + b for a, b in zip(self.heads[attention], work, strict=True)]

    def _before_host(self, host: PriorAttentionHost, args: Any, kwargs: Any) -> None:
        self._projections[host.prior_attention] = host.model_dim, host.projects_all_keys(kwargs)

    def _before_attention(self, attention: PriorAttention, args: Any, kwargs: Any) -> None:
        self._before, self._executed = self.total(), None

    def _after_attention(self, attention: PriorAttention, args: Any, kwargs: Any, output: Any) -> None:
        self.inside += self.total() - self._before
        query, key, value = _named(("query", "key", "value"), args, kwargs)
        heads, sizes = attention.num_heads, (query.shape[3], value.shape[3])
        hidden = (kwargs.get("kv_lens"), kwargs.get("query_offsets"))
        pairs, rows = count_dense_pairs(query, _num_keys(attention, key), attention.is_causal, *hidden)
        dense = attention_work(sum(pairs) // heads, sum(rows) // heads, *sizes)
        if not attention.is_pruned:
            if self._executed is not None:
                pairs, rows = self._executed
            now = [attention_work(sum(pairs) // heads, sum(rows) // heads, *sizes)] * heads
        else:
            assert self._executed is not None
            pairs, rows = self._executed
            now = [attention_work(sum(pairs[h::heads]), sum(rows[h::heads]), *sizes) for h in range(heads)]
        self._add(attention, [Comparison(dense, work) for work in now])
        model_dim, all_keys = self._projections.pop(attention, (None, False))
        if model_dim is not None:
            self._add_projections(attention, model_dim, all_keys, query, key.shape[1], value.shape[3])

    def _add_projections(
        self, attention: PriorAttention, model_dim: int, all_keys: bool, query: Tensor, key_heads: int, value_dim: int
    ) -> None:
        """Those of the queries' tokens; the keys and values of a key head count for its first query head."""
        batch, heads, tokens, head_dim = query.shape
        kept = [tokens] * key_heads
        if attention.keep is not None and not all_keys:
            kept = kept_rows(attention.kept(tokens))
        own = linear_work(batch * tokens, model_dim, head_dim)
        work = []
        for head in range(heads):
            key_head, place = divmod(head, heads // key_heads)
            rows = [0, 0] if place else [tokens, kept[key_head]]
            dense, now = (own + linear_work(batch * count, model_dim, head_dim + value_dim) for count in rows)
            work.append(Comparison(dense, now))
        self._add(attention, work)
        self.inside += sum((head.now for head in work), Work())


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Arguments by name, of a call whose first positional arguments have these names."""
    found = {**dict(zip(names, args, strict=False)), **kwargs}
    return [found[name] for name in names]


def _num_keys(attention: PriorAttention, key: Tensor) -> int:
    """The keys of the input, of which a compacted attention gets those only that it keeps."""
    return attention.num_keys if attention.keep is not None else key.shape[2]
