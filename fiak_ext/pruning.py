"""Pruning a trained model by learned priors (Algorithms 1-3 of the paper) or by mean posterior attention.

``prune`` removes exactly the asked number of (query, key) pairs and replaces the priors by a static pattern of weight
one; ``calibrate`` measures the mean posterior attention that ``importance="posterior"`` ranks by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fiak_ext.modules import PriorAttention
from fiak_ext.pattern import SparsePattern

__all__ = ["Counts", "HeadReport", "LayerReport", "PruningReport", "calibrate", "prune"]

Scope: TypeAlias = Literal["layer", "head", "global", "row"]
Importance: TypeAlias = Literal["prior", "posterior", "random"]

_SCOPES = ("layer", "head", "global", "row")
_IMPORTANCES = ("prior", "posterior", "random")
_TABLE_HEADER = (
    "layer",
    "pairs",
    "asked",
    "gone",
    "left",
    "by head",
    "keys gone",
    "empty rows",
    "empty keys",
    "dead rows",
)
_CHUNK_BYTES = 1 << 26  # of float64 attention that `calibrate` holds at a time


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What pruning was asked to do and did, to a head, a layer or a model.

    A pair is eligible where its query can see its key (j <= i where causal) and, on a calibrated model, where
    calibration reached it.

    Attributes:
        pairs: eligible pairs.
        asked: eligible pairs to be gone at the end; None without an amount, or where ``scope`` sets no budget
            at this level.
        pruned: eligible pairs that are gone, those of pruned keys included.
        kept: entries of the resulting pattern.
        unreached: pairs that a query can see but calibration never reached, which are not in ``pairs`` and ``pruned``.
        density: share of the eligible pairs that is left, 0..1.
        keys_asked, keys_pruned: keys to be pruned whole, and keys that were.
        empty_rows: queries left without a key; their output is 0.
        empty_columns: keys left without a query, pruned ones included.
        dead_rows: rows whose prior never moved (see ``prune``); None where nothing can be said.
    """

    pairs: int
    asked: int | None
    pruned: int
    kept: int
    unreached: int
    density: float
    keys_asked: int
    keys_pruned: int
    empty_rows: int
    empty_columns: int
    dead_rows: int | None


@dataclass(frozen=True, kw_only=True)
class HeadReport(Counts):
    """One head of one pattern group.

    Attributes:
        group, head: which one.
        dead_ranges: the dead rows as half-open ranges (start, stop).
    """

    group: int
    head: int
    dead_ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class LayerReport(Counts):
    """One ``PriorAttention``.

    Attributes:
        name: its name in ``model.named_modules()``, "" where the model itself is one.
        heads: its heads, group by group.
    """

    name: str
    heads: tuple[HeadReport, ...]


@dataclass(frozen=True, kw_only=True)
class PruningReport(Counts):
    """The whole model; ``str(report)`` is a table with a line per layer.

    Attributes:
        amount, keys, scope, keep_diagonal: the arguments of ``prune``.
        importance: "prior", "posterior", "random" or "tensor".
        layers: the layers in the order of ``model.named_modules()``.
    """

    amount: float | None
    keys: float
    scope: str
    importance: str
    keep_diagonal: bool
    layers: tuple[LayerReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of the report as dicts, lists, numbers and strings, ready for ``json.dumps``."""
        report = asdict(self)
        report["layers"] = list(report["layers"])
        for layer in report["layers"]:
            layer["heads"] = list(layer["heads"])
            for head in layer["heads"]:
                head["dead_ranges"] = [list(bounds) for bounds in head["dead_ranges"]]
        return report

    def __str__(self) -> str:
        lines = [_TABLE_HEADER, *(_table_line(layer.name or "(model)", layer, layer.heads) for layer in self.layers)]
        lines.append(_table_line("total", self, [head for layer in self.layers for head in layer.heads]))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join([f"{line[0]:<{widths[0]}}", *map(str.rjust, line[1:], widths[1:])]) for line in lines]

        amount = "keys only" if self.amount is None else f"amount {self.amount:g}"
        diagonal = ", diagonal kept" if self.keep_diagonal else ""
        text = [f"{amount}, keys {self.keys:g}, scope {self.scope}, importance {self.importance}{diagonal}", *table]
        if self.unreached:
            text.append(f"{self.unreached} pairs that calibration did not reach count towards nothing.")
        if self.dead_rows:
            text.append("Dead rows (their prior never moved, so most likely they cannot reach the loss):")
            text += [f"  {layer.name or '(model)'}: {_dead_text(layer)}" for layer in self.layers if layer.dead_rows]
        return "\n".join(text)


def prune(
    model: nn.Module,
    amount: float | None = None,
    *,
    keys: float = 0.0,
    scope: Scope = "layer",
    importance: Importance | Tensor | Mapping[str, Tensor] = "prior",
    keep_diagonal: bool = False,
    generator: torch.Generator | None = None,
) -> PruningReport:
    """Replaces the priors of every ``PriorAttention`` in ``model`` by a static pattern of the most important pairs.

    Algorithm 1 (score pruning) is ``keys=0``. Algorithm 2 (mixed) prunes keys first, then scores until exactly
    ``round(amount * eligible)`` pairs of each scope are gone, pruned keys' pairs included. Algorithm 3 (GMM) is
    ``keys`` alone. The survivors get weight one. The least important go first, of equals the lower index (in the
    order layer, group, head, query, key), so that the same importance always gives the same pattern.

    Eligible are all pairs that a query can see (``j <= i`` where causal) and, on a calibrated model, that calibration
    reached, whatever ``importance`` is. Pairs that it did not reach go first, all of them, and count towards nothing.

    Args:
        model: holds at least one ``PriorAttention``, and no pruned one.
        amount: share of the eligible pairs that is gone at the end, 0..1; None: what ``keys`` removes. With
            ``kind="gmm"``, one prior per key, whole keys go only, and the amount can only be what ``keys`` removes.
        keys: share of the keys that every head (of every pattern group) loses, ``round(keys * M)`` of them, 0..1.
            They are ranked by ``S(j)``, the importance summed over the queries and, where causal, divided by the
            number of eligible ones.
        scope: what the amount is a share of and is ranked over: a "layer" with all its heads, a "head", a "row" of a
            head, or "global", all layers together.
        importance: "prior", the learned prior (``PriorAttention.importance``); "posterior", what ``calibrate``
            measured; "random", uniform draws, the control that every claim needs; or numbers of the caller's,
            ``[groups, heads, N, M]`` (``[heads, N, M]`` with one group), finite where eligible: a Tensor for a model
            with one ``PriorAttention``, or a dict from module name to Tensor with one for each.
        keep_diagonal: the pairs (i, i) of keys that are not pruned whole are never pruned.
        generator: for ``importance="random"``; the default is torch's own.

    Returns:
        What was asked and done, per layer and head, with empty rows and columns, and dead rows: rows that cannot
        reach the loss, as all but the class token's in the last layer of a classifier. No gradient reaches their
        prior, so the report names the rows whose prior is still the same for all their eligible keys (two or more).
        That is evidence, not proof: the prior of a row that only padding filled has not moved either. Unknown (None)
        are layers without a prior for each pair (``kind`` "gmm" and "softmax") and layers in which no row moved:
        their priors were not trained.

    Raises:
        ValueError: no ``PriorAttention``, or one that is pruned; neither amount nor keys; an argument outside its
            range; a budget below what ``keys`` alone removes, or above what may go; importance "prior" without a
            prior, "posterior" without calibration, tensors of wrong names or shapes or with non-finite numbers. The
            model is left as it was.

    Source: Algorithms 1-3 of the paper, with exact budgets: the k1-hat of Algorithm 2, Step 4, misses the total that is
    asked for whenever the pruned keys are not average ones.
    """
    attentions = _attentions("prune", model)
    amount = None if amount is None else _fraction("amount", amount)
    keys = _fraction("keys", keys)
    if amount is None and keys == 0:
        raise ValueError("prune: amount or keys must be given (got amount=None, keys=0)")
    if scope not in _SCOPES:
        raise ValueError(f"prune: scope must be one of {', '.join(_SCOPES)} (got {scope!r})")
    if generator is not None and not (isinstance(importance, str) and importance == "random"):
        raise ValueError("prune: generator must be None unless importance='random'")
    own = _own_importance(attentions, importance)

    layers = [_Layer(name, attention, keep_diagonal) for name, attention in attentions.items()]
    budgets: list[list[int]] = []
    for pool in [layers] if scope == "global" else [[layer] for layer in layers]:
        ranks = [_rank(layer, importance, own, generator) for layer in pool]
        for layer, rank in zip(pool, ranks, strict=True):
            layer.prune_keys(rank, round(keys * layer.num_keys))
        if amount is not None:
            budgets.append(_prune_scores(pool, ranks, amount, keys, scope))

    reports = []
    for index, layer in enumerate(layers):
        asked = budgets[index] if budgets and scope != "global" else []
        reports.append(layer.report(asked, round(keys * layer.num_keys)))
    patterns = [SparsePattern.from_mask(layer.kept.unflatten(0, (layer.attention.groups, -1))) for layer in layers]
    # Everything that can be wrong has been refused by now: an error leaves the model as it was.
    for layer, pattern in zip(layers, patterns, strict=True):
        layer.attention.set_pattern(pattern)
    return PruningReport(
        **_total(reports, sum(map(sum, budgets)) if budgets else None),
        amount=amount,
        keys=keys,
        scope=scope,
        importance=importance if isinstance(importance, str) else "tensor",
        keep_diagonal=keep_diagonal,
        layers=tuple(reports),
    )


class _Layer:
    """A ``PriorAttention`` while it is being pruned, on the CPU, with R = groups * heads patterns."""

    def __init__(self, name: str, attention: PriorAttention, keep_diagonal: bool) -> None:
        self.name = name
        self.attention = attention
        self.num_keys = attention.num_keys
        visible = attention.eligible().cpu()
        shape = (attention.groups * attention.num_heads, *visible.shape)
        self.visible = visible  # [N, M]; eligible and kept: [R, N, M]
        reached = attention.reached
        self.eligible = visible.expand(shape) if reached is None else visible & (reached.cpu() > 0).reshape(shape)
        if attention.kind == "gmm":  # one prior per key: no pair goes alone
            self.protected = torch.ones_like(visible)
        else:
            self.protected = torch.eye(*visible.shape, dtype=torch.bool) & keep_diagonal
        self.kept = visible & (self.eligible | self.protected)
        self.keys_pruned = torch.zeros(shape[0], shape[2], dtype=torch.bool)  # [R, M]

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
        for head in range(len(score)):
            self.keys_pruned[head] = _smallest(score[head], count)
        self.kept &= ~self.keys_pruned[:, None]

    def report(self, budgets: Sequence[int], keys_asked: int) -> LayerReport:
        """Counts of all heads; budgets: one for the layer, for each head or for each row, or none."""
        heads, rows, _ = self.kept.shape
        if len(budgets) == heads * rows:
            budgets = [sum(budgets[start : start + rows]) for start in range(0, heads * rows, rows)]
        dead = _unmoved_rows(self.attention, self.visible)
        reports = []
        for index in range(heads):
            kept, eligible = self.kept[index], self.eligible[index]
            pairs, pruned = int(eligible.sum()), int((eligible & ~kept).sum())
            reports.append(
                HeadReport(
                    group=index // self.attention.num_heads,
                    head=index % self.attention.num_heads,
                    pairs=pairs,
                    asked=budgets[index] if len(budgets) == heads else None,
                    pruned=pruned,
                    kept=int(kept.sum()),
                    unreached=int((self.visible & ~eligible).sum()),
                    density=_density(pairs, pruned),
                    keys_asked=keys_asked,
                    keys_pruned=int(self.keys_pruned[index].sum()),
                    empty_rows=int((~kept.any(1)).sum()),
                    empty_columns=int((~kept.any(0)).sum()),
                    dead_rows=None if dead is None else int(dead[index].sum()),
                    dead_ranges=() if dead is None else _ranges(dead[index]),
                )
            )
        return LayerReport(**_total(reports, sum(budgets) if budgets else None), name=self.name, heads=tuple(reports))


def _prune_scores(
    pool: Sequence[_Layer], ranks: Sequence[Tensor], amount: float, keys: float, scope: Scope
) -> list[int]:
    """Prunes the least important pairs of every scope in the pool up to its exact budget; returns these budgets."""
    units = {"layer": 1, "global": 1, "head": len(pool[0].kept), "row": len(pool[0].kept) * len(pool[0].visible)}[scope]

    def joined(parts: Iterable[Tensor]) -> Tensor:  # [units, pairs of a unit]
        return torch.cat([part.reshape(units, -1) for part in parts], dim=1)

    eligible = joined(layer.eligible for layer in pool)
    kept = joined(layer.kept for layer in pool)
    candidates = kept & eligible & ~joined(layer.protected.expand_as(layer.kept) for layer in pool)
    rank = joined(ranks).masked_fill_(~candidates, math.inf)
    totals, gone, free = (mask.sum(1).tolist() for mask in (eligible, eligible & ~kept, candidates))
    budgets = [round(amount * total) for total in totals]
    for unit, budget in enumerate(budgets):
        if not gone[unit] <= budget <= gone[unit] + free[unit]:
            limit = f"keys={keys:g} alone removes {gone[unit]}"
            if budget > gone[unit]:
                gmm = any(layer.attention.kind == "gmm" for layer in pool)
                reason = "kind='gmm' loses whole keys only" if gmm else "keep_diagonal=True protects the others"
                limit = f"at most {gone[unit] + free[unit]} can go, as {reason}"
            asked = f"{budget} of {totals[unit]} pairs of {_unit_name(pool, scope, unit)}"
            raise ValueError(f"prune: amount must be possible (got {amount:g}, that is {asked}, but {limit})")
        kept[unit] &= ~_smallest(rank[unit], budget - gone[unit])
    start = 0
    for layer in pool:
        size = layer.kept.numel() // units
        layer.kept = kept[:, start : start + size].reshape(layer.kept.shape)
        start += size
    return budgets


def _smallest(values: Tensor, count: int) -> Tensor:
    """Mask [n] of the ``count`` smallest of ``values`` [n], of equals those with the lower index, in linear time."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = values.kthvalue(count).values
    mask = values < threshold
    ties = (values == threshold).nonzero()[: count - int(mask.sum()), 0]
    mask[ties] = True
    return mask


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
    elif importance == "posterior":
        if attention.posterior is None:
            raise ValueError(f"prune: importance='posterior' needs calibrate first (layer {layer.name!r} has none)")
        rank = attention.posterior
    else:
        if attention.prior is None:
            raise ValueError(
                f"prune: importance='prior' needs a prior (layer {layer.name!r} has kind={attention.kind!r}); "
                "'posterior', 'random' and tensors do not"
            )
        rank = attention.importance()
    rank = rank.detach().cpu()
    if rank.dtype not in (torch.float32, torch.float64):
        rank = rank.double()
    rank = rank.reshape(layer.kept.shape)
    if not bool((rank.isfinite() | ~layer.eligible).all()):
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
    if set(importance) != set(attentions):
        missing, unknown = set(attentions) - set(importance), set(importance) - set(attentions)
        raise ValueError(
            "prune: importance must have the name of every PriorAttention as key "
            f"(missing: {_names(missing)}; unknown: {_names(unknown)})"
        )
    for name, attention in attentions.items():
        tensor = importance[name]
        shape = (attention.groups, attention.num_heads, attention.num_queries, attention.num_keys)
        shapes = (shape, shape[1:]) if attention.groups == 1 else (shape,)
        if not isinstance(tensor, Tensor) or tensor.is_complex() or tuple(tensor.shape) not in shapes:
            got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"prune: importance of layer {name!r} must be a real Tensor of shape {wanted} (got {got})")
    return dict(importance)


def _unmoved_rows(attention: PriorAttention, visible: Tensor) -> Tensor | None:
    """Mask [R, N] of rows whose prior is the same for two or more visible keys; None where ``prune`` says unknown."""
    if attention.kind != "fiak" or attention.prior is None:
        return None
    prior = attention.prior.detach().cpu().flatten(0, 1)
    low = prior.masked_fill(~visible, math.inf).amin(-1)
    high = prior.masked_fill(~visible, -math.inf).amax(-1)
    several = visible.sum(-1) > 1
    unmoved = (low == high) & several
    return None if bool((unmoved == several).all()) else unmoved


def _total(parts: Sequence[Counts], asked: int | None) -> dict[str, Any]:
    """The fields of ``Counts``, summed over parts."""
    names = ("pairs", "pruned", "kept", "unreached", "keys_asked", "keys_pruned", "empty_rows", "empty_columns")
    sums = {name: sum(getattr(part, name) for part in parts) for name in names}
    dead = [part.dead_rows for part in parts if part.dead_rows is not None]
    return {
        **sums,
        "asked": asked,
        "density": _density(sums["pairs"], sums["pruned"]),
        "dead_rows": sum(dead) if dead else None,
    }


def _density(pairs: int, pruned: int) -> float:
    return (pairs - pruned) / pairs if pairs else 0.0


def _table_line(name: str, counts: Counts, heads: Sequence[HeadReport]) -> tuple[str, ...]:
    def number(value: int | None) -> str:
        return "-" if value is None else str(value)

    low, high = min(head.density for head in heads), max(head.density for head in heads)
    share = (f"{counts.density:.2%}", f"{low:.1%}..{high:.1%}")
    rest = (counts.keys_pruned, counts.empty_rows, counts.empty_columns, counts.dead_rows)
    return (name, number(counts.pairs), number(counts.asked), number(counts.pruned), *share, *map(number, rest))


def _dead_text(layer: LayerReport) -> str:
    """ "rows 1-196 of heads 0-3": heads with the same dead rows are named together."""
    heads_of: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for index, head in enumerate(layer.heads):
        if head.dead_ranges:
            heads_of.setdefault(head.dead_ranges, []).append(index)
    texts = []
    for ranges, heads in heads_of.items():
        mask = torch.zeros(len(layer.heads), dtype=torch.bool)
        mask[heads] = True
        texts.append(f"rows {_range_text(ranges)} of heads {_range_text(_ranges(mask))}")
    return "; ".join(texts)


def _ranges(mask: Tensor) -> tuple[tuple[int, int], ...]:
    """The True stretches of mask [n] as half-open ranges."""
    padded = torch.nn.functional.pad(mask.to(torch.int8), (1, 1))
    edges = padded.diff().nonzero()[:, 0].tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _range_text(ranges: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{start}-{stop - 1}" if stop - start > 1 else str(start) for start, stop in ranges)


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


def _attentions(op: str, model: nn.Module) -> dict[str, PriorAttention]:
    """The model's attention modules by name, refused where there is none or one is pruned."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, PriorAttention)}
    if not found:
        raise ValueError(f"{op}: model must hold a PriorAttention (got {type(model).__name__} without one)")
    pruned = [name for name, attention in found.items() if attention.is_pruned]
    if pruned:
        raise ValueError(f"{op}: model must not be pruned yet (pruned: {_names(pruned)})")
    return found


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> None:
    """Measures the mean posterior attention of every ``PriorAttention``, for ``prune(..., importance="posterior")``.

    Runs the model in evaluation mode, without gradients, over all batches. The mean of each (head, i, j) is over the
    samples in which i and j are both visible: inside the input's length, before the sample's padding where there are
    ``kv_lens`` (i too where the module has as many queries as keys, as in self-attention), and j <= i where causal.
    It is accumulated in float64, sample by sample, so that it does not depend on how samples are batched. With
    pattern groups, sample b of a batch counts for group ``b % groups``, as in attention. Sets, on every module,
    ``posterior`` (float32, ``[groups, heads, N, M]``, 0 where never visible) and ``reached`` (int64, the same shape:
    the samples behind each mean). An earlier calibration is replaced.

    Args:
        model: holds at least one ``PriorAttention`` of any kind, and no pruned one.
        batches: the inputs; a few batches of typical ones suffice.
        forward: called as ``forward(model, batch)``. The default passes a mapping as keyword arguments, of a tuple or
            list (a data loader's inputs and targets) the first item, and anything else as it is.

    Raises:
        ValueError: no ``PriorAttention`` or a pruned one, no batches, or a ``PriorAttention`` that no batch ran
            through. Whatever is raised, earlier calibrations, modes and recorders are left as they were.

    Source: the posterior of Section 2.1 averaged over data, ``mean_b a_ij``. For a pretrained model, whose uniform
    prior says nothing, it is the importance to rank by without any training.
    """
    attentions = _attentions("calibrate", model)
    means = {name: _MeanPosterior(attention) for name, attention in attentions.items()}
    run = _default_forward if forward is None else forward
    seen = 0
    with _evaluating(model), _recording(attentions, means), torch.no_grad():
        for batch in batches:
            run(model, batch)
            seen += 1
    if seen == 0:
        raise ValueError("calibrate: batches must hold at least one batch (got none)")
    idle = [name for name, mean in means.items() if mean.total is None]
    if idle:
        raise ValueError(f"calibrate: batches must run through every PriorAttention (none ran through {_names(idle)})")
    for name, attention in attentions.items():
        attention.posterior, attention.reached = means[name].result()


class _MeanPosterior:
    """Running sum of one module's attention over samples; called as its recorder."""

    def __init__(self, attention: PriorAttention) -> None:
        self.attention = attention
        self.total: Tensor | None = None  # [groups, heads, N, M], float64
        self.samples: Tensor | None = None  # [groups, 1, N, M]

    def __call__(self, query: Tensor, key: Tensor, options: Mapping[str, Any]) -> None:
        attention = self.attention
        groups, heads, rows, columns = attention.groups, attention.num_heads, attention.num_queries, attention.num_keys
        if self.total is None or self.samples is None:
            self.total = torch.zeros(groups, heads, rows, columns, dtype=torch.float64, device=query.device)
            self.samples = torch.zeros(groups, 1, rows, columns, dtype=torch.int64, device=query.device)
        batch, head_dim = query.size(0), query.size(3)
        kv_lens, offsets = options["kv_lens"], options["query_offsets"]
        lengths = [key.size(2)] * batch if kv_lens is None else kv_lens.tolist()
        starts = [0] * batch if offsets is None else offsets.tolist()
        weight = None if attention.prior is None else attention.weight()
        scale = head_dim**-0.5 if attention.scale is None else attention.scale
        eligible = attention.eligible()
        for sample, (length, start) in enumerate(zip(lengths, starts, strict=True)):
            group = sample % groups
            keys = key[sample, :, :length].double().repeat_interleave(heads // key.size(1), dim=0)
            # A query behind the length is padding, if its position is also that of a key.
            queries = query[sample, :, : max(0, length - start)] if rows == columns else query[sample]
            step = max(1, _CHUNK_BYTES // (8 * heads * max(1, length)))
            for part in queries.split(step, dim=1):
                row = slice(start, start + part.size(1))
                start = row.stop
                score = part.double() @ keys.mT * scale
                if attention.score == "gaussian":  # |q|^2 cancels in the normalisation
                    score -= scale / 2 * keys.square().sum(-1)[:, None]
                support = eligible[row, :length].expand_as(score)
                if weight is not None:
                    prior = (weight[group] if weight.size(2) == 1 else weight[group, :, row])[..., :length].double()
                    score += prior.log()
                    support = support & (prior > 0)
                posterior = score.masked_fill(~support, -math.inf).softmax(-1).masked_fill(~support, 0)
                self.total[group, :, row, :length] += posterior
                self.samples[group, :, row, :length] += 1

    def result(self) -> tuple[Tensor, Tensor]:
        """posterior and reached, as ``calibrate`` sets them."""
        assert self.total is not None and self.samples is not None
        posterior = (self.total / self.samples.clamp(min=1)).float()
        reached = self.samples * self.attention.eligible().to(self.samples.device)
        return posterior, reached.expand_as(posterior)


def _default_forward(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _recording(attentions: Mapping[str, PriorAttention], recorders: Mapping[str, _MeanPosterior]) -> Iterator[None]:
    """Sets every module's recorder, and what it was again afterwards."""
    earlier = {name: attention.recorder for name, attention in attentions.items()}
    for name, attention in attentions.items():
        attention.recorder = recorders[name]
    try:
        yield
    finally:
        for name, attention in attentions.items():
            attention.recorder = earlier[name]
