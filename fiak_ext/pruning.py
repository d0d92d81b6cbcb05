"""Pruning a trained model by learned priors (Algorithms 1-3 of the paper), or by what data say about its attention.

``prune`` removes exactly the asked number of (query, key) pairs and replaces the priors by a static pattern of weight
one. ``patterns`` and ``set_patterns`` take such patterns from one model to another.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fiak_ext.calibration import arguments_of
from fiak_ext.flops import model_report, pair_flops
from fiak_ext.measure import all_attentions, dense_attentions, plain_names
from fiak_ext.nn import PriorAttention
from fiak_ext.pattern import SparsePattern
from fiak_ext.pruning_report import HeadReport, LayerReport, PruningReport, density, ranges, total

__all__ = ["patterns", "prune", "set_patterns"]

Scope: TypeAlias = Literal["layer", "head", "global", "row"]
Importance: TypeAlias = Literal["prior", "posterior", "gradient", "random"]

_SCOPES = ("layer", "head", "global", "row")
_IMPORTANCES = ("prior", "posterior", "gradient", "random")

_CHUNK = 1 << 18  # pairs that are looked at at a time


def prune(
    model: nn.Module,
    amount: float | None = None,
    *,
    keys: float = 0.0,
    scope: Scope = "layer",
    importance: Importance | Tensor | Mapping[str, Tensor] = "prior",
    keep_diagonal: bool = False,
    generator: torch.Generator | None = None,
    dead_rows: Mapping[str, Tensor] | None = None,
    target_flops: float | None = None,
    example: Any = None,
) -> PruningReport:
    """Replaces the priors of every ``PriorAttention`` in ``model`` by a static pattern of the most important pairs.

    Algorithm 1 (pairs; the paper calls it score pruning) is ``keys=0``. Algorithm 2 (mixed) prunes keys first, then
    pairs until exactly ``round(amount * eligible)`` of each scope are gone, pruned keys' pairs included. Algorithm 3
    (GMM) is ``keys`` alone. The survivors get weight one. The least important go first, of equals the lower index (in
    the order layer, group, head, query, key), so that the same importance always gives the same pattern.

    Eligible are all pairs that a query can see (``j <= i`` where causal) and, on a calibrated model, that calibration
    reached, whatever ``importance`` is; but not those of ``dead_rows``. Pairs that calibration did not reach and pairs
    of dead rows go first, all of them, and count towards nothing.

    Args:
        model: holds at least one ``PriorAttention``, and no pruned one.
        amount: share of the eligible pairs that is gone at the end, 0..1; None: what ``keys`` removes, or
            ``target_flops`` asks for. With ``kind="gmm"``, one prior per key, whole keys go only, and the amount can
            only be what ``keys`` removes.
        keys: share of the keys that every head (of every pattern group) loses, ``round(keys * M)`` of them, 0..1.
            They are ranked by ``S(j)``, the importance summed over the queries and, where causal, divided by the
            number of eligible ones.
        scope: what the amount is a share of and is ranked over: a "layer" with all its heads, a "head", a "row" of a
            head, or "global", all layers together.
        importance: "prior", the learned prior (``PriorAttention.importance``); "posterior" and "gradient", what
            ``calibrate`` measured; "random", uniform draws, the control that every claim needs; or numbers of the
            caller's, ``[groups, heads, N, M]`` (``[heads, N, M]`` with one group), finite where eligible: a Tensor for
            a model with one ``PriorAttention``, or a dict from module name to Tensor with one for each.
        keep_diagonal: the pairs (i, i) of keys that are not pruned whole, in rows that are not dead, are never pruned.
        generator: for ``importance="random"``; the default is torch's own.
        dead_rows: rows to remove for free, for the name of every ``PriorAttention`` a bool tensor ``[groups, heads,
            N]``, as ``find_dead_rows`` gives them.
        target_flops: instead of an amount: the smallest amount is taken with which the model executes at most this
            share, 0..1, of its dense operations on ``example`` (:func:`fiak_ext.flops.model_report`, ``torch``
            convention; what ``compact`` saves beyond that is not counted). ``scope="global"`` spends it where pairs
            matter least.
        example: inputs of the model for ``target_flops``: one of ``calibrate``'s batches.

    Returns:
        What was asked and done, per layer and head, with empty rows and columns, what is left by input length, and dead
        rows: rows that cannot reach the loss, as all but the class token's in the last layer of a classifier. Where
        ``dead_rows`` does not name them, the report names the rows whose prior is still the same for all their eligible
        keys (two or more), as no gradient reaches theirs. That is evidence, not proof: the prior of a row that only
        padding filled has not moved either. Unknown (None) are layers without a prior for each pair (``kind`` "gmm" and
        "softmax") and layers in which no row moved: their priors were not trained.

    Raises:
        ValueError: no ``PriorAttention``, or one that is pruned; neither amount, keys nor target_flops; an argument
            outside its range; a budget below what ``keys`` alone removes, or above what may go; operations that no
            amount can save; importance "prior" without a prior, "posterior" and "gradient" without calibration, tensors
            of wrong names or shapes or with non-finite numbers. The model is left as it was.

    Source: Algorithms 1-3 of the paper, with exact budgets: the k1-hat of Algorithm 2, Step 4, misses the total that is
    asked for whenever the pruned keys are not average ones.
    """
    attentions = dense_attentions("prune", model)
    amount = None if amount is None else _fraction("amount", amount)
    keys = _fraction("keys", keys)
    target_flops = None if target_flops is None else _fraction("target_flops", target_flops)
    if amount is None and keys == 0 and target_flops is None:
        raise ValueError("prune: amount, keys or target_flops must be given (got amount=None, keys=0)")
    if amount is not None and target_flops is not None:
        raise ValueError(f"prune: amount must be None with target_flops (got {amount:g})")
    if (target_flops is None) != (example is None):
        raise ValueError("prune: example must be given with target_flops, and only then")
    if scope not in _SCOPES:
        raise ValueError(f"prune: scope must be one of {', '.join(_SCOPES)} (got {scope!r})")
    if generator is not None and not (isinstance(importance, str) and importance == "random"):
        raise ValueError("prune: generator must be None unless importance='random'")
    importance = plain_names(importance) if isinstance(importance, Mapping) else importance
    own = _own_importance(attentions, importance)
    dead = _checked_rows(attentions, plain_names(dead_rows) if isinstance(dead_rows, Mapping) else dead_rows)

    layers = [_Layer(name, attention, keep_diagonal, dead.get(name)) for name, attention in attentions.items()]
    pools = []
    for members in [layers] if scope == "global" else [[layer] for layer in layers]:
        ranks = [_rank(layer, importance, own, generator) for layer in members]
        for layer, rank in zip(members, ranks, strict=True):
            layer.prune_keys(rank, round(keys * layer.num_keys))
        pools.append(_Pool(members, ranks, scope))
    flops = None
    if target_flops is not None:
        amount, flops = _amount_for(target_flops, _Work(model, example), pools)
    budgets: list[list[int]] = []
    if amount is not None:
        for pool in pools:
            pool.check(amount, keys)
            for layer, kept in zip(pool.layers, pool.kept_after(amount), strict=True):
                layer.kept = kept
            budgets.append(pool.budgets(amount).tolist())

    reports = []
    for index, layer in enumerate(layers):
        asked = budgets[index] if budgets and scope != "global" else []
        reports.append(layer.report(asked, round(keys * layer.num_keys)))
    found = [layer.pattern() for layer in layers]
    # Everything that can be wrong has been refused by now: an error leaves the model as it was.
    for layer, pattern in zip(layers, found, strict=True):
        layer.attention.set_pattern(pattern)
    alike = len({layer.num_keys for layer in layers}) == 1
    return PruningReport(
        **total(reports, sum(map(sum, budgets)) if budgets else None),
        amount=amount,
        keys=keys,
        scope=scope,
        importance=importance if isinstance(importance, str) else "tensor",
        keep_diagonal=keep_diagonal,
        target_flops=target_flops,
        flops=flops,
        layers=tuple(reports),
        density_by_length=_density_by_length(layers) if alike else (),
    )


def patterns(model: nn.Module) -> dict[str, SparsePattern]:
    """The patterns of a pruned model by the names of its ``PriorAttention`` modules, for :func:`set_patterns`.

    Raises:
        ValueError: no ``PriorAttention``, or one that is not pruned or is compacted.
    """
    found = all_attentions("patterns", model)
    result = {}
    for name, attention in found.items():
        pattern = attention.pattern
        if pattern is None or attention.is_compacted:
            state = "compacted" if attention.is_compacted else "dense"
            raise ValueError(f"patterns: model must be pruned and not compacted (got {name!r} {state})")
        result[name] = pattern
    return result


def set_patterns(model: nn.Module, patterns: Mapping[str, SparsePattern]) -> None:
    """Prunes a model to given patterns, as those that :func:`patterns` takes from a separately trained one.

    Priors, if the model has any, are deleted; the pairs of the patterns have weight 1. Fine-tune afterwards.

    Args:
        model: dense, or pruned and not compacted.
        patterns: one for the name of each ``PriorAttention``, of its sizes.

    Raises:
        ValueError: no ``PriorAttention``; missing or unknown names; a pattern of other sizes, or with pairs above the
            diagonal where attention is causal; a compacted ``PriorAttention``.
        TypeError: something else than a ``SparsePattern``.
        RuntimeError: indices that are not a well-formed pattern.
            Whatever is raised, the model is left as it was.

    Source: Table 6 of the paper: the mask of a FiAK model on a softmax model.
    """
    attentions = all_attentions("set_patterns", model)
    patterns = plain_names(patterns)
    _check_names("set_patterns: patterns", attentions, patterns)
    fitting = {}
    for name, attention in attentions.items():
        pattern = patterns[name]
        if not isinstance(pattern, SparsePattern):
            raise TypeError(f"set_patterns: patterns[{name!r}] must be a SparsePattern (got {type(pattern).__name__})")
        if attention.is_compacted:
            raise ValueError(f"set_patterns: model must not be compacted (got {name!r} compacted)")
        try:
            fitting[name] = attention._fitting(pattern)
        except ValueError as error:
            raise ValueError(f"set_patterns: patterns[{name!r}] must fit the model ({error})") from error
    for name, attention in attentions.items():
        attention.set_pattern(fitting[name])


class _Layer:
    """A ``PriorAttention`` while it is being pruned, on the CPU, with R = groups * heads patterns."""

    def __init__(self, name: str, attention: PriorAttention, keep_diagonal: bool, dead: Tensor | None) -> None:
        self.name = name
        self.attention = attention
        self.num_keys = attention.num_keys
        visible = attention.eligible().cpu()
        shape = (attention.groups * attention.num_heads, *visible.shape)
        self.visible = visible  # [N, M]; eligible and kept: [R, N, M]
        self.dead = None if dead is None else dead.cpu().reshape(shape[:2])  # [R, N]
        if attention.kind == "gmm":  # one prior per key: no pair goes alone
            self.protected = visible
        else:
            self.protected = torch.eye(*visible.shape, dtype=torch.bool) & visible & keep_diagonal
        live = visible.expand(shape).clone() if self.dead is None else visible & ~self.dead.unsqueeze(-1)
        if attention.reached is None:
            self.eligible, self.kept = live, live.clone()
        else:
            self.eligible = (attention.reached > 0).cpu().reshape(shape).logical_and_(live)
            self.kept = live.logical_and_(self.protected).logical_or_(self.eligible)
        self.keys_pruned = torch.zeros(shape[0], shape[2], dtype=torch.bool)  # [R, M]

    def candidates(self, head: int, rows: slice) -> Tensor:
        """bool [rows, M]: what may go pair by pair; protected pairs of dead rows are not kept, so these are not it."""
        return self.kept[head, rows] & self.eligible[head, rows] & ~self.protected[rows]

    def blocks(self) -> Iterator[tuple[int, slice]]:
        """Heads and rows of ``_CHUNK`` pairs each, in their order."""
        heads, queries, keys = self.kept.shape
        size = max(1, _CHUNK // keys)
        for head in range(heads):
            for start in range(0, queries, size):
                yield head, slice(start, min(start + size, queries))

    def prune_keys(self, rank: Tensor, count: int) -> None:
        """Prunes the ``count`` keys with the smallest S(j) from every head (Step 3 of Algorithms 2 and 3)."""
        if count == 0:
            return
        score = torch.zeros(self.keys_pruned.shape, dtype=torch.float64)
        # Row after row, so that equal columns get equal sums whatever the number of threads.
        for row, eligible in zip(rank.unbind(1), self.eligible.unbind(1), strict=True):
            score += row.double().masked_fill(~eligible, 0)
        queries = self.eligible.sum(1)
        if self.attention.is_causal:
            score /= queries.clamp(min=1)
        score.masked_fill_(queries == 0, -math.inf)
        self.keys_pruned = _smallest(score, torch.full((len(score),), count))
        self.kept &= ~self.keys_pruned[:, None]

    def pattern(self) -> SparsePattern:
        """What is kept."""
        attention = self.attention
        counts = torch.stack([head.sum(1) for head in self.kept]).flatten()
        # Head after head: nonzero gives 16 bytes for each pair.
        columns = torch.cat([head.nonzero()[:, 1].int() for head in self.kept])
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        sizes = (attention.num_heads, attention.num_queries, attention.num_keys, attention.groups)
        return SparsePattern(crow.int() if len(columns) < 2**31 else crow, columns, *sizes)

    def report(self, budgets: Sequence[int], keys_asked: int) -> LayerReport:
        """Counts of all heads; budgets: one for the layer, for each head or for each row, or none."""
        heads, rows, _ = self.kept.shape
        if len(budgets) == heads * rows:
            budgets = [sum(budgets[start : start + rows]) for start in range(0, heads * rows, rows)]
        dead = _unmoved_rows(self.attention, self.visible) if self.dead is None else self.dead
        reports = []
        for index in range(heads):
            kept, eligible = self.kept[index], self.eligible[index]
            pairs, pruned = int(eligible.sum()), int((eligible & ~kept).sum())
            live = self.visible if self.dead is None else self.visible & ~self.dead[index, :, None]
            reports.append(
                HeadReport(
                    group=index // self.attention.num_heads,
                    head=index % self.attention.num_heads,
                    pairs=pairs,
                    asked=budgets[index] if len(budgets) == heads else None,
                    pruned=pruned,
                    kept=int(kept.sum()),
                    unreached=int(live.sum()) - pairs,
                    dead=0 if self.dead is None else int(self.visible[self.dead[index]].sum()),
                    density=density(pairs, pruned),
                    keys_asked=keys_asked,
                    keys_pruned=int(self.keys_pruned[index].sum()),
                    empty_rows=int((~kept.any(1)).sum()),
                    empty_columns=int((~kept.any(0)).sum()),
                    dead_rows=None if dead is None else int(dead[index].sum()),
                    dead_ranges=() if dead is None else ranges(dead[index]),
                )
            )
        return LayerReport(
            **total(reports, sum(budgets) if budgets else None),
            name=self.name,
            heads=tuple(reports),
            density_by_length=_density_by_length([self]),
        )


class _Pool:
    """Layers that share a scope, or the one layer of its own, and the units in it that have a budget each."""

    def __init__(self, layers: Sequence[_Layer], ranks: Sequence[Tensor], scope: Scope) -> None:
        self.layers = layers
        self.ranks = ranks
        self.scope = scope
        counts = []  # eligible, gone, and free to go, of each row
        for layer in layers:
            rows = torch.zeros(3, *layer.kept.shape[:2], dtype=torch.int64)
            for head, part in layer.blocks():
                eligible, kept = layer.eligible[head, part], layer.kept[head, part]
                for count, mask in zip(rows, (eligible, eligible & ~kept, layer.candidates(head, part)), strict=True):
                    count[head, part] = mask.sum(1)
            counts.append(rows)
        if scope == "row":
            units = counts[0].flatten(1)
        elif scope == "head":
            units = counts[0].sum(2)
        else:
            units = torch.stack([count.sum((1, 2)) for count in counts]).sum(0).unsqueeze(1)
        self.totals, self.gone, free = units  # [units]
        self.most = self.gone + free  # that can be gone

    def budgets(self, amount: float) -> Tensor:
        """int64 [units]: eligible pairs to be gone."""
        return (amount * self.totals.double()).round().long()

    def too_small(self, amount: float) -> bool:
        return bool((self.budgets(amount) < self.gone).any())

    def too_large(self, amount: float) -> bool:
        return bool((self.budgets(amount) > self.most).any())

    def check(self, amount: float, keys: float) -> None:
        """Raises ValueError for an amount that is impossible."""
        budgets = self.budgets(amount)
        impossible = ((budgets < self.gone) | (budgets > self.most)).nonzero()
        if not len(impossible):
            return
        unit = int(impossible[0])
        budget, gone, most = int(budgets[unit]), int(self.gone[unit]), int(self.most[unit])
        limit = f"keys={keys:g} alone removes {gone}"
        if budget > gone:
            gmm = any(layer.attention.kind == "gmm" for layer in self.layers)
            reason = "kind='gmm' loses whole keys only" if gmm else "keep_diagonal=True protects the others"
            limit = f"at most {most} can go, as {reason}"
        asked = f"{budget} of {int(self.totals[unit])} pairs of {_unit_name(self.layers, self.scope, unit)}"
        raise ValueError(f"prune: amount must be possible (got {amount:g}, that is {asked}, but {limit})")

    def kept_after(self, amount: float) -> list[Tensor]:
        """What each layer [R, N, M] keeps once the least important pairs of every unit are gone."""
        counts = self.budgets(amount) - self.gone
        kept = [layer.kept.clone() for layer in self.layers]
        blocks = [(place, head, rows) for place, layer in enumerate(self.layers) for head, rows in layer.blocks()]
        if self.scope == "row":
            (layer,), (rank,) = self.layers, self.ranks
            counts = counts.view(layer.kept.shape[:2])
            for _, head, rows in blocks:
                values = rank[head, rows].masked_fill(~layer.candidates(head, rows), math.inf)
                kept[0][head, rows] &= ~_smallest(values, counts[head, rows])
            return kept
        for unit, count in enumerate(counts.tolist()):
            if count == 0:
                continue
            own = [block for block in blocks if self.scope != "head" or block[1] == unit]

            def candidates(own: list[tuple[int, int, slice]] = own) -> Iterator[Tensor]:
                for place, head, rows in own:
                    yield self.ranks[place][head, rows][self.layers[place].candidates(head, rows)]

            # Layers of a model may be ranked in float32 and float64.
            dtype = functools.reduce(torch.promote_types, (rank.dtype for rank in self.ranks))
            threshold, ties = _threshold(candidates, dtype, count)
            for place, head, rows in own:
                free = self.layers[place].candidates(head, rows)
                values = self.ranks[place][head, rows].to(dtype)
                gone = (values < threshold) & free
                equal = ((values == threshold) & free).view(-1)
                if ties and bool(equal.any()):
                    first = equal.nonzero()[:ties, 0]
                    gone.view(-1)[first] = True
                    ties -= len(first)
                kept[place][head, rows] &= ~gone
        return kept


class _Work:
    """What a forward pass on the example executes, as a function of the pairs that are kept (``torch`` convention)."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        args, kwargs = arguments_of(example)
        self.dense = model_report(model, *args, **kwargs).model.dense.torch
        self.costs = {name: cost.cpu() for name, cost in pair_flops(model, *args, **kwargs).items()}

    def pairs(self, layer: _Layer, kept: Tensor) -> int:
        """Of the layer's pairs kept [R, N, M] or [N, M]."""
        costs, heads = self.costs[layer.name], layer.attention.num_heads
        return sum(int((costs[head // heads] * mask).sum()) for head, mask in enumerate(kept.expand(layer.kept.shape)))


def _amount_for(target: float, work: _Work, pools: Sequence[_Pool]) -> tuple[float, float]:
    """The smallest amount with which at most the share `target` of the dense work is left, and the share then left."""
    layers = [layer for pool in pools for layer in pool.layers]
    other = work.dense - sum(work.pairs(layer, layer.visible) for layer in layers)
    pairs = sum(int(pool.totals.sum()) for pool in pools)

    def left(count: int) -> float:
        kept = [part for pool in pools for part in pool.kept_after(count / pairs)]
        return (other + sum(work.pairs(layer, part) for layer, part in zip(layers, kept, strict=True))) / work.dense

    # A larger amount keeps a part of what a smaller one keeps: all three conditions turn true once.
    counts = range(pairs + 1) if pairs else range(0)
    least = bisect_left(counts, True, key=lambda count: not any(pool.too_small(count / pairs) for pool in pools))
    most = bisect_left(counts, True, key=lambda count: any(pool.too_large(count / pairs) for pool in pools)) - 1
    if least > most:
        raise ValueError(
            "prune: target_flops needs an amount that every scope can lose, and there is none "
            f"(got scope {pools[0].scope!r}; whole keys alone go by keys and with kind='gmm')"
        )
    if left(most) > target:
        raise ValueError(
            f"prune: target_flops must be at least {left(most):.4f}, what is left without the pairs that may go "
            f"(got {target:g})"
        )
    count = bisect_left(counts, True, lo=least, hi=most, key=lambda count: left(count) <= target)
    return count / pairs, left(count)


def _density_by_length(layers: Sequence[_Layer]) -> tuple[float, ...]:
    """Of layers with the same number of keys: the share of visible pairs that is left, for each length of the input."""
    kept = sum(_pairs_by_length(head) for layer in layers for head in layer.kept)
    visible = sum(len(layer.kept) * _pairs_by_length(layer.visible) for layer in layers)
    return tuple((kept / torch.as_tensor(visible).clamp(min=1)).tolist())


def _pairs_by_length(mask: Tensor) -> Tensor:
    """int64 [M]: pairs of mask [N, M] among the first 1, 2, ... keys, and as many queries where N = M."""
    if mask.size(0) != mask.size(1):
        return mask.sum(0).cumsum(0)
    # An input has the pair (i, j) from the length max(i, j) + 1 on.
    return (mask.tril().sum(1) + mask.triu(1).sum(0)).cumsum(0)


def _smallest(values: Tensor, counts: Tensor) -> Tensor:
    """Mask [rows, n] of the ``counts`` [rows] smallest of ``values``, of equals those with the lower index."""
    last = values.sort(1).values.gather(1, (counts - 1).clamp(min=0).unsqueeze(1))
    last = last.masked_fill(counts.unsqueeze(1) == 0, -math.inf)
    smaller, equal = values < last, values == last
    ties = counts.unsqueeze(1) - smaller.sum(1, keepdim=True)
    return smaller | (equal & (equal.cumsum(1) <= ties))


def _threshold(chunks: Callable[[], Iterator[Tensor]], dtype: torch.dtype, count: int) -> tuple[Tensor, int]:
    """The ``count``-th smallest of the numbers in all chunks, and how many equals of it are among the smallest.

    In linear time and without a copy of them: their bits, ordered as the numbers are, are found 16 at a time.
    """
    bits = torch.finfo(dtype).bits
    prefix, ties = 0, count
    for shift in range(bits - 16, -1, -16):
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for values in chunks():
            ordered = _ordered(values.to(dtype))
            if shift == bits - 16:
                digits = (ordered >> shift) + (1 << 15)
            else:
                digits = ordered[ordered >> (shift + 16) == prefix] >> shift & 0xFFFF
            histogram += torch.bincount(digits, minlength=1 << 16)
        upto = histogram.cumsum(0)
        digit = int(torch.searchsorted(upto, ties))
        ties -= int(upto[digit] - histogram[digit])
        prefix = digit - (1 << 15) if shift == bits - 16 else prefix << 16 | digit
    key = torch.tensor(prefix, dtype=torch.int32 if bits == 32 else torch.int64)
    return _flipped(key).view(dtype), ties


def _ordered(values: Tensor) -> Tensor:
    """Integers in the order of floating-point numbers; 0 and -0 are one number."""
    return _flipped((values + 0.0).view(torch.int32 if values.dtype == torch.float32 else torch.int64))


def _flipped(bits: Tensor) -> Tensor:
    """Negative numbers have their magnitude's bits the other way round; its own inverse."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _rank(
    layer: _Layer,
    importance: Importance | Tensor | Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    generator: torch.Generator | None,
) -> Tensor:
    """What pairs are ranked by, [R, N, M], float32 or float64, on the CPU, finite where eligible."""
    attention = layer.attention
    if layer.name in own:
        rank = own[layer.name]
    elif importance == "random":
        # Drawn in float64: float32 has too few values for the draws of a layer to be distinct.
        device = "cpu" if generator is None else generator.device
        rank = torch.rand(layer.kept.shape, dtype=torch.float64, device=device, generator=generator)
    elif importance in ("posterior", "gradient"):
        measured = attention.posterior if importance == "posterior" else attention.saliency
        if measured is None:
            raise ValueError(f"prune: importance={importance!r} needs calibrate first (layer {layer.name!r} has none)")
        rank = measured
    else:
        if attention.prior is None:
            raise ValueError(
                f"prune: importance='prior' needs a prior (layer {layer.name!r} has kind={attention.kind!r}); "
                "'posterior', 'gradient', 'random' and tensors do not"
            )
        rank = attention.importance()
    rank = rank.detach().cpu()
    if rank.dtype not in (torch.float32, torch.float64):
        rank = rank.double()
    rank = rank.reshape(layer.kept.shape)
    if not all(bool((rank[part].isfinite() | ~layer.eligible[part]).all()) for part in layer.blocks()):
        raise ValueError(f"prune: importance must be finite where eligible (layer {layer.name!r} has NaN or infinity)")
    return rank


def _own_importance(
    attentions: Mapping[str, PriorAttention], importance: Importance | Tensor | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The caller's importance by layer name, with checked names and shapes; empty where ``importance`` is a name."""
    if isinstance(importance, str) and importance in _IMPORTANCES:
        return {}
    if isinstance(importance, Tensor):
        if len(attentions) != 1:
            raise ValueError(
                "prune: importance must be a dict from module name to Tensor where the model has more than one "
                f"PriorAttention (got a Tensor for {len(attentions)} of them)"
            )
        importance = dict.fromkeys(attentions, importance)
    if not isinstance(importance, Mapping):
        names = ", ".join(_IMPORTANCES)
        raise ValueError(f"prune: importance must be one of {names}, a Tensor or a dict of these (got {importance!r})")
    _check_names("prune: importance", attentions, importance)
    for name, attention in attentions.items():
        tensor = importance[name]
        shape = (attention.groups, attention.num_heads, attention.num_queries, attention.num_keys)
        shapes = (shape, shape[1:]) if attention.groups == 1 else (shape,)
        if not isinstance(tensor, Tensor) or tensor.is_complex() or tuple(tensor.shape) not in shapes:
            got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"prune: importance of layer {name!r} must be a real Tensor of shape {wanted} (got {got})")
    return dict(importance)


def _check_names(argument: str, attentions: Mapping[str, PriorAttention], given: Mapping[str, object]) -> None:
    if set(given) != set(attentions):
        missing, unknown = set(attentions) - set(given), set(given) - set(attentions)
        raise ValueError(
            f"{argument} must have the name of every PriorAttention as key "
            f"(missing: {_names(missing)}; unknown: {_names(unknown)})"
        )


def _checked_rows(
    attentions: Mapping[str, PriorAttention], dead_rows: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor]:
    if dead_rows is None:
        return {}
    if not isinstance(dead_rows, Mapping):
        raise ValueError(f"prune: dead_rows must be a dict from module name to Tensor (got {type(dead_rows).__name__})")
    _check_names("prune: dead_rows", attentions, dead_rows)
    for name, attention in attentions.items():
        rows = dead_rows[name]
        shape = (attention.groups, attention.num_heads, attention.num_queries)
        if not isinstance(rows, Tensor) or rows.dtype != torch.bool or tuple(rows.shape) != shape:
            got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"prune: dead_rows of layer {name!r} must be a bool Tensor of shape {shape} (got {got})")
    return dead_rows


def _unmoved_rows(attention: PriorAttention, visible: Tensor) -> Tensor | None:
    """Mask [R, N] of rows whose prior is the same for two or more visible keys; None where ``prune`` says unknown."""
    if attention.kind != "fiak" or attention.prior is None:
        return None
    heads = attention.prior.detach().cpu().flatten(0, 1)
    low = torch.stack([head.masked_fill(~visible, math.inf).amin(-1) for head in heads])
    high = torch.stack([head.masked_fill(~visible, -math.inf).amax(-1) for head in heads])
    several = visible.sum(-1) > 1
    unmoved = (low == high) & several
    return None if bool((unmoved == several).all()) else unmoved


def _unit_name(pool: Sequence[_Layer], scope: Scope, unit: int) -> str:
    if scope == "global":
        return "the model"
    layer = pool[0]
    index, row = divmod(unit, len(layer.visible)) if scope == "row" else (unit, None)
    parts = [f"layer {layer.name!r}"]
    if scope != "layer":
        group, head = divmod(index, layer.attention.num_heads)
        parts.insert(0, f"head {head}" + (f" of group {group}" if layer.attention.groups > 1 else ""))
    if row is not None:
        parts.insert(0, f"row {row}")
    return " of ".join(parts)


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"


def _fraction(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"prune: {name} must be a number from 0 to 1 (got {value!r})")
    return float(value)
