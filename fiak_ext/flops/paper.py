"""Table 1 and Appendix D of the paper: the cost of one layer's attention."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import torch

from fiak_ext.flops.pairs import eligible_pairs
from fiak_ext.flops.work import Work, attention_work, linear_work
from fiak_ext.pattern import SparsePattern

__all__ = ["attention_cost", "table1"]

Method = Literal["dense", "pair", "mixed", "key"]


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

    pairs = heads * eligible_pairs(tokens, tokens, is_causal)
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
        work = attention_work(pairs, rows, head_dim, value_dim, value_pairs)
        if model_dim is not None:
            work += linear_work(queries, model_dim, head_dim)
            work += linear_work(int(projected.sum()), model_dim, head_dim + value_dim)
        works.append(work)
    return works
