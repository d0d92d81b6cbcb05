"""How many pairs calls of attention ops compute, and how many rows calls of compaction ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fiak_ext.pattern import plan_num_queries

__all__ = ["PairCounts", "count_dense_pairs", "count_pairs", "eligible_pairs", "has_data", "kept_rows", "read"]


# Pairs, and rows with at least one pair: of each batch element and query head [batch * heads], or only the totals [1]
# where no data says more.
PairCounts = tuple[list[int], list[int]]


def has_data(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def read(tensor: Tensor | None) -> list[int] | None:
    """The values of a tensor; None where there is no tensor, or no data in it."""
    return tensor.tolist() if tensor is not None and has_data(tensor) else None


def eligible_pairs(queries: int, keys: int, is_causal: bool) -> int:
    """The number of pairs (i, j), j <= i if causal."""
    if not is_causal:
        return queries * keys
    seen = min(queries, keys)
    return seen * (seen + 1) // 2 + (queries - seen) * keys


def count_pairs(arguments: Mapping[str, Any]) -> PairCounts:
    """The pairs of a prior_attention or csr_attention call, or of its backward, from the arguments by name."""
    if "crow_indices" in arguments:
        return _count_csr_pairs(arguments)
    query, num_keys = arguments["query"], arguments["key"].shape[2]
    return count_dense_pairs(query, num_keys, arguments.get("is_causal", False), arguments.get("kv_lens"))


def count_dense_pairs(
    query: Tensor, num_keys: int, is_causal: bool, kv_lens: Tensor | None = None, query_offsets: Tensor | None = None
) -> PairCounts:
    """The pairs that neither causality nor ``kv_lens`` hides from ``query [batch, heads, queries, D]``."""
    batch, heads, queries, _ = query.shape
    lens, offsets = read(kv_lens), read(query_offsets)
    if lens is None and offsets is None:
        pairs = batch * heads * eligible_pairs(queries, num_keys, is_causal)
        return [pairs], [batch * heads * queries if num_keys else 0]
    lens = [num_keys] * batch if lens is None else lens
    offsets = [0] * batch if offsets is None else offsets
    pairs_of, rows_of = [], []
    for length, offset in zip(lens, offsets, strict=True):
        before = eligible_pairs(offset, length, is_causal)
        pairs_of += [eligible_pairs(offset + queries, length, is_causal) - before] * heads
        rows_of += [queries if length else 0] * heads
    return pairs_of, rows_of


def kept_rows(keep: Tensor) -> list[int]:
    """Kept rows of each head [H]; padding counts where keep cannot be read."""
    return (keep >= 0).sum(1).tolist() if has_data(keep) else [keep.shape[1]] * keep.shape[0]


def _count_csr_pairs(arguments: Mapping[str, Any]) -> PairCounts:
    query, crow, col = arguments["query"], arguments["crow_indices"], arguments["col_indices"]
    plan, kv_lens, offsets = (arguments.get(name) for name in ("plan", "kv_lens", "query_offsets"))
    batch, heads, queries, _ = query.shape
    if not batch * heads * queries:
        return [0], [0]
    if not has_data(crow):
        shape = _pattern_shape(crow, heads, queries) if offsets is None else (1, heads, queries)
        return [batch * heads * col.shape[0] // (shape[0] * shape[1])], [batch * heads * queries]
    num_queries = queries if plan is None else plan_num_queries(plan)
    shape = _pattern_shape(crow, heads, num_queries)
    lens, first = read(kv_lens), read(offsets)
    if lens is None:
        lens = [arguments["key"].shape[2]] * batch  # the pattern may have more keys

    def count_entries(length: int) -> Tensor:
        """The entries of each row among the first ``length`` keys."""
        visible = torch.cat([crow.new_zeros(1), (col < length).cumsum(0)])
        return visible[crow.long()].diff().view(shape)

    entries = {length: count_entries(length) for length in set(lens)}
    pairs, rows = [], []
    for b in range(batch):
        start = 0 if first is None else first[b]
        own = entries[lens[b]][b % shape[0], :, start : start + queries].expand(heads, -1)
        pairs += own.sum(-1).tolist()
        rows += (own > 0).sum(-1).tolist()
    return pairs, rows


def _pattern_shape(crow: Tensor, heads: int, num_queries: int) -> tuple[int, int, int]:
    """Groups, heads of a group (1 where all query heads share a pattern) and rows of the CSR matrix of a call."""
    pattern_heads = (crow.shape[0] - 1) // num_queries
    of_group = heads if pattern_heads % heads == 0 else 1
    return pattern_heads // of_group, of_group, num_queries
