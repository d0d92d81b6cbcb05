"""What data say about pairs: mean posterior attention, saliency, soft EM, and rows that cannot reach the loss.

``calibrate`` measures what ``prune(..., importance="posterior")`` and ``"gradient"`` rank by; :class:`SoftEM` trains
priors without gradients; ``find_dead_rows`` finds what ``prune(..., dead_rows=...)`` removes for free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, distributed, nn

from fiak_ext.modules import PriorAttention

__all__ = ["SoftEM", "all_attentions", "calibrate", "dense_attentions", "find_dead_rows"]

Measured: TypeAlias = Literal["posterior", "gradient"]
Forward: TypeAlias = Callable[[nn.Module, Any], object]

_CHUNK_BYTES = 1 << 26  # of float64 attention that a recorder holds at a time
_NO_WEIGHT = math.log(torch.finfo(torch.float32).tiny)  # -87.3, a bias below its row's largest that hides a pair


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    importance: Measured = "posterior",
    forward: Forward | None = None,
) -> None:
    """Measures, over all batches, what :func:`~fiak_ext.prune` is to rank the pairs of every ``PriorAttention`` by.

    The model runs in evaluation mode. The mean of each (head, i, j) is over the samples in which i and j are both
    visible: inside the input's length, before the sample's padding where there are ``kv_lens`` (i too where the module
    has as many queries as keys, as in self-attention), and j <= i where causal. Where a bias is added to the scores,
    pairs are not visible either whose bias is so far below the largest of the row, by 88 or more in all heads, that
    they have no weight in float32: Swin's -100 between the parts of a shifted window. The mean is accumulated in
    float64, sample by sample, so that it does not depend on how samples are batched. With pattern groups, sample b of a
    batch counts for group ``b % groups``, as in attention. Sets, on every module, ``posterior`` or ``saliency``
    (float32, ``[groups, heads, N, M]``, 0 where never visible) and ``reached`` (int64, the same shape: the samples
    behind each mean). An earlier calibration of the same importance is replaced.

    ``"posterior"``: ``mean_b a_ij``, without gradients. ``"gradient"``: ``-mean_b dL/dlog w_ij`` at the present weights
    w: to first order, how much the loss rises when the weight of the pair shrinks by a factor of e; a gradient step
    from uniform priors has this direction. Modules without a prior (``kind="softmax"``) take part with a uniform one.
    The gradient of a GMM prior is that of its key, shared by all queries.

    Under data parallelism, with ``torch.distributed`` initialised, every rank calls this with its share of the data,
    which may be none at all. Sums and counts are reduced over the ranks, so that all get what one process gets from all
    data (to the rounding of a sum in float64). Pass the model itself, not its ``DistributedDataParallel``.

    Args:
        model: holds at least one ``PriorAttention`` of any kind, and no pruned one.
        batches: the inputs; a few batches of typical ones suffice.
        importance: what to measure.
        forward: called as ``forward(model, batch)``. The default passes a mapping as keyword arguments, of a tuple or
            list (a data loader's inputs and targets) the first item, and anything else as it is. With ``"gradient"`` it
            returns the loss, summed over the samples of the batch (a mean is as good if all batches have one size).

    Raises:
        ValueError: an unknown importance, no ``PriorAttention`` or a pruned one, no batches, a ``PriorAttention`` that
            no batch ran through, or a forward that returns no loss where one is needed. Whatever is raised, earlier
            calibrations, modes, recorders and priors are left as they were.

    Source: the posterior of Section 2.1 averaged over data. For a pretrained model, whose uniform prior says nothing,
    it is the importance to rank by without any training. The saliency is the first-order term of the loss in log w, as
    in Molchanov et al. (2017), with its sign.
    """
    if importance not in ("posterior", "gradient"):
        raise ValueError(f"calibrate: importance must be 'posterior' or 'gradient' (got {importance!r})")
    attentions = dense_attentions("calibrate", model)
    run = _run_batch if forward is None else forward
    means: dict[str, _Mean] = {}
    seen = 0
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        if importance == "posterior":
            stack.enter_context(torch.no_grad())
            means = {name: _MeanPosterior(attention) for name, attention in attentions.items()}
        else:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_with_priors(attentions.values()))
            means = {name: _MeanSaliency(attention) for name, attention in attentions.items()}
        stack.enter_context(_recording(attentions, means))
        for batch in batches:
            result = run(model, batch)
            seen += 1
            if importance == "gradient":
                _add_gradients(list(means.values()), result)
    totals = [torch.tensor(seen, device=next(iter(means.values())).calls.device)]
    for mean in means.values():
        totals += [mean.calls, mean.total, mean.samples]
    _reduce(totals)
    if not totals[0]:
        raise ValueError("calibrate: batches must hold at least one batch (got none)")
    idle = [name for name, mean in means.items() if not mean.calls]
    if idle:
        raise ValueError(
            f"calibrate: batches must run through every PriorAttention (none ran through {', '.join(map(repr, idle))})"
        )
    for name, attention in attentions.items():
        measured, attention.reached = means[name].result()
        if importance == "posterior":
            attention.posterior = measured
        else:
            attention.saliency = measured


class SoftEM:
    """Trains the priors of a model without gradients: ``pi <- (1 - momentum) pi + momentum * mean posterior``.

    The posterior is that of the training forward passes since the last step (:func:`calibrate` says over which samples
    it is averaged; that of a GMM prior is also averaged over the queries). Pairs that these never made visible keep
    their pi. pi is the softmax of the logits, or ``|pi|`` of ``"clamp"``. Until :meth:`close`, or the end of a
    ``with`` block, the priors need no gradient, so that an optimizer leaves them alone, and every forward pass in
    training mode computes its attention a second time, in float64::

        with SoftEM(model, momentum=0.05) as em:
            for batch in batches:
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
                em.step()
        prune(model, 0.7)

    With ``torch.distributed`` initialised, all ranks take each step together, and it is that of all their data.

    Args:
        model: holds at least one ``PriorAttention``, all of which have a prior.
        momentum: the weight of the new posterior, above 0 and at most 1.

    Raises:
        ValueError: a model without ``PriorAttention``, with a pruned one or one without prior, or a momentum outside
            its range.

    Source: the M-step of a mixture with fixed components, taken partly, over mini-batches (online EM).
    """

    def __init__(self, model: nn.Module, momentum: float = 0.05) -> None:
        self._attentions = dense_attentions("SoftEM", model)
        without = [name for name, attention in self._attentions.items() if attention.prior is None]
        if without:
            raise ValueError(f"SoftEM: model must have priors (none in {', '.join(map(repr, without))})")
        if not 0 < momentum <= 1:
            raise ValueError(f"SoftEM: momentum must be above 0 and at most 1 (got {momentum})")
        self.momentum = momentum
        self._means = {
            name: _MeanPosterior(attention, only_training=True) for name, attention in self._attentions.items()
        }
        self._stack = ExitStack()
        self._stack.enter_context(_recording(self._attentions, self._means))
        self._stack.enter_context(_requiring_grad(self._attentions.values(), False))

    def __enter__(self) -> SoftEM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends recording; the priors need gradients again where they did before."""
        self._stack.close()

    @torch.no_grad()
    def step(self) -> None:
        """Moves the priors towards the mean posterior since the last step.

        Raises:
            RuntimeError: a ``PriorAttention`` that no forward pass in training mode ran through since then.
        """
        _reduce([tensor for mean in self._means.values() for tensor in (mean.calls, mean.total, mean.samples)])
        idle = [name for name, mean in self._means.items() if not mean.calls]
        if idle:
            raise RuntimeError(
                "SoftEM.step: a forward pass in training mode must come first "
                f"(none ran through {', '.join(map(repr, idle))})"
            )
        for name, attention in self._attentions.items():
            _move_prior(attention, self._means[name], self.momentum)
            self._means[name].clear()


@torch.no_grad()
def _move_prior(attention: PriorAttention, mean: _Mean, momentum: float) -> None:
    assert attention.prior is not None
    total, samples = mean.total, mean.visible_samples()
    if attention.kind == "gmm":
        total, samples = total.sum(2, keepdim=True), samples.sum(2, keepdim=True)
        eligible = torch.ones_like(samples, dtype=torch.bool)
    else:
        eligible = attention.eligible().expand_as(samples)
    prior = attention.prior.double()
    if attention.parameterization == "clamp":
        pi = prior.abs()
    else:
        pi = prior.masked_fill(~eligible, -math.inf).softmax(-1)
    moved = torch.lerp(pi, total / samples.clamp(min=1), momentum)
    if attention.parameterization == "softmax":
        moved = moved.clamp(min=torch.finfo(attention.prior.dtype).tiny).log()
        # The logits of a row are free up to a constant: those of pairs that stay must have the same one.
        pi = pi.clamp(min=torch.finfo(attention.prior.dtype).tiny).log()
    moved = torch.where(samples > 0, moved, pi)
    attention.prior.copy_(torch.where(eligible, moved, prior))


def find_dead_rows(model: nn.Module, batch: Any, *, forward: Forward | None = None) -> dict[str, Tensor]:
    """Finds rows of attention that cannot reach the loss, for ``prune(..., dead_rows=...)``.

    Such are, in the last layer of a classifier that looks at its class token alone, all other rows. A row is dead if,
    in the model's evaluation mode, the gradient of a random combination of the model's outputs with respect to its
    output is exactly 0 in every sample of the batch. Rows that the batch does not have (beyond the inputs' length, or
    padding in all samples) are not called dead. That is evidence for these inputs, and proof where, as with a class
    token, the model's structure is the reason.

    Args:
        model: holds at least one ``PriorAttention``, and no pruned one.
        batch: a few inputs, of the longest kind.
        forward: called as ``forward(model, batch)``, by default as :func:`calibrate` does; returns what the loss is
            computed from, as a Tensor or in mappings, tuples and lists. Anything that the loss does not use hides dead
            rows: for a Hugging Face model whose loss needs the logits, return these alone.

    Returns:
        For the name of every ``PriorAttention`` a bool tensor ``[groups, num_heads, num_queries]``, True where dead.

    Raises:
        ValueError: no ``PriorAttention`` or a pruned one, or a forward without a floating-point output that depends on
            attention.
    """
    attentions = dense_attentions("find_dead_rows", model)
    run = _run_batch if forward is None else forward
    counts = {name: _Mean(attention) for name, attention in attentions.items()}
    probes: list[tuple[str, Tensor, Tensor]] = []  # name, a zero that was added to the output, the first rows

    def probe(name: str) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)
            offsets = kwargs.get("query_offsets")
            first = torch.zeros(output.size(0), dtype=torch.int64) if offsets is None else offsets.cpu()
            probes.append((name, zero, first))
            return output + zero

        return add

    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_recording(attentions, counts))
        for name, attention in attentions.items():
            stack.callback(attention.register_forward_hook(probe(name), with_kwargs=True).remove)
        outputs = [output for output in _tensors(run(model, batch)) if output.requires_grad]
    if not outputs or not probes:
        raise ValueError(
            "find_dead_rows: forward must return floating-point tensors that attention leads to (got none)"
        )
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    gradients: Sequence[Tensor | None] = torch.autograd.grad(
        outputs, [zero for _, zero, _ in probes], weights, allow_unused=True
    )

    alive = {name: mean.samples.new_zeros(mean.heads_shape[:3], dtype=torch.bool) for name, mean in counts.items()}
    for (name, _, first), gradient in zip(probes, gradients, strict=True):
        if gradient is None:
            continue
        groups = attentions[name].groups
        for sample, start in enumerate(first.tolist()):
            rows = (gradient[sample] != 0).any(-1)
            alive[name][sample % groups, :, start : start + rows.size(1)] |= rows
    return {name: (mean.samples > 0).any(-1) & ~alive[name] for name, mean in counts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Recorders


class _Place(NamedTuple):
    """Where the queries and keys of one sample of a recorded forward pass belong."""

    group: int
    start: int  # row of the first query
    queries: int  # that are not padding
    keys: int


def _places(attention: PriorAttention, query: Tensor, key: Tensor, options: Mapping[str, Any]) -> list[_Place]:
    batch = query.size(0)
    kv_lens, offsets = options["kv_lens"], options["query_offsets"]
    lengths = [key.size(2)] * batch if kv_lens is None else kv_lens.tolist()
    starts = [0] * batch if offsets is None else offsets.tolist()
    places = []
    for sample, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        # A query behind the length is padding, if its position is also that of a key.
        square = attention.num_queries == attention.num_keys
        queries = min(query.size(2), max(0, length - start)) if square else query.size(2)
        places.append(_Place(sample % attention.groups, start, queries, length))
    return places


class _Mean:
    """Sum over samples of something that every pair has, and the number of samples; called as a module's recorder."""

    def __init__(self, attention: PriorAttention, only_training: bool = False) -> None:
        self.attention = attention
        self.only_training = only_training
        self.heads_shape = (attention.groups, attention.num_heads, attention.num_queries, attention.num_keys)
        device = attention.eligible().device
        self.total = torch.zeros(self.heads_shape, dtype=torch.float64, device=device)
        self.samples = torch.zeros(attention.groups, 1, *self.heads_shape[2:], dtype=torch.int64, device=device)
        self.calls = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def __call__(self, query: Tensor, key: Tensor, options: Mapping[str, Any]) -> None:
        if self.only_training and not self.attention.training:
            return
        self.calls += 1
        bias = options["bias"]
        shown = None if bias is None else (bias - bias.amax(-1, keepdim=True) > _NO_WEIGHT).any(1, keepdim=True)
        for sample, place in enumerate(_places(self.attention, query, key, options)):
            self.add(query[sample, :, : place.queries], key[sample, :, : place.keys], place, options)
            rows, columns = slice(place.start, place.start + place.queries), slice(place.keys)
            seen = 1 if shown is None else shown[place.group % shown.size(0), :, rows, columns]
            self.samples[place.group, :, rows, columns] += seen

    def add(self, query: Tensor, key: Tensor, place: _Place, options: Mapping[str, Any]) -> None:
        """Adds what the queries [heads, n, D] and keys [key heads, m, D] of one sample give."""

    def clear(self) -> None:
        for tensor in (self.total, self.samples, self.calls):
            tensor.zero_()

    def visible_samples(self) -> Tensor:
        """int64 [groups, heads, N, M]: the samples in which each pair is visible."""
        return (self.samples * self.attention.eligible()).expand(self.heads_shape)

    def result(self) -> tuple[Tensor, Tensor]:
        """The mean, float32, and ``reached``, as ``calibrate`` sets them."""
        return (self.total / self.samples.clamp(min=1)).float(), self.visible_samples()


class _MeanPosterior(_Mean):
    """Of the attention ``a_ij`` of Eq. 12."""

    def add(self, query: Tensor, key: Tensor, place: _Place, options: Mapping[str, Any]) -> None:
        attention = self.attention
        heads, head_dim = query.size(0), query.size(2)
        keys = key.double().repeat_interleave(heads // key.size(0), dim=0)
        weight = None if attention.prior is None else attention.weight()[place.group]
        bias = options["bias"]
        scale = head_dim**-0.5 if attention.scale is None else attention.scale
        eligible = attention.eligible()
        start, columns = place.start, slice(place.keys)
        for part in query.split(max(1, _CHUNK_BYTES // (8 * heads * max(1, place.keys))), dim=1):
            rows = slice(start, start + part.size(1))
            start = rows.stop
            score = part.double() @ keys.mT * scale
            if attention.score == "gaussian":  # |q|^2 cancels in the normalisation
                score -= scale / 2 * keys.square().sum(-1)[:, None]
            if bias is not None:
                score += bias[place.group % bias.size(0), :, rows, columns]
            support = eligible[rows, columns].expand_as(score)
            if weight is not None:
                prior = (weight if weight.size(1) == 1 else weight[:, rows])[..., columns].double()
                score += prior.log()
                support = support & (prior > 0)
            posterior = score.masked_fill(~support, -math.inf).softmax(-1).masked_fill(~support, 0)
            self.total[place.group, :, rows, columns] += posterior


class _MeanSaliency(_Mean):
    """Of ``-dL/dlog w``; the recorder only counts samples, :func:`_add_gradients` adds the sums over a batch."""


@torch.no_grad()
def _add_gradients(means: list[_Mean], loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"calibrate: forward must return the loss, a Tensor of one element with gradient (got {what})")
    priors = [mean.attention.prior for mean in means]
    for mean, prior, gradient in zip(
        means,
        priors,
        torch.autograd.grad(loss, [prior for prior in priors if prior is not None], allow_unused=True),
        strict=True,
    ):
        if gradient is None or prior is None:
            continue
        # The gradient of the logits of a softmax is that of log w, whose sum over a row is 0.
        factor = prior if mean.attention.parameterization == "clamp" else 1.0
        mean.total -= (gradient.double() * factor).expand(mean.heads_shape)


# ---------------------------------------------------------------------------------------------------------------------
# The model around it


def all_attentions(op: str, model: nn.Module) -> dict[str, PriorAttention]:
    """The model's attention modules by name, refused where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, PriorAttention)}
    if not found:
        raise ValueError(f"{op}: model must hold a PriorAttention (got {type(model).__name__} without one)")
    return found


def dense_attentions(op: str, model: nn.Module) -> dict[str, PriorAttention]:
    """The same, refused where one is pruned, too."""
    found = all_attentions(op, model)
    pruned = [name for name, attention in found.items() if attention.is_pruned]
    if pruned:
        raise ValueError(f"{op}: model must not be pruned yet (pruned: {', '.join(map(repr, sorted(pruned)))})")
    return found


def _run_batch(model: nn.Module, batch: Any) -> object:
    """A mapping goes in as keyword arguments, of a tuple or list the first item, anything else as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _reduce(tensors: list[Tensor]) -> None:
    """Sums tensors over all ranks, in place, where torch.distributed is in use."""
    if distributed.is_available() and distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


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
def _recording(attentions: Mapping[str, PriorAttention], recorders: Mapping[str, _Mean]) -> Iterator[None]:
    """Sets every module's recorder, and what it was again afterwards."""
    earlier = {name: attention.recorder for name, attention in attentions.items()}
    for name, attention in attentions.items():
        attention.recorder = recorders[name]
    try:
        yield
    finally:
        for name, attention in attentions.items():
            attention.recorder = earlier[name]


@contextmanager
def _requiring_grad(attentions: Iterable[PriorAttention], needed: bool) -> Iterator[None]:
    """Sets whether priors need gradients, and what it was again afterwards."""
    earlier = [
        (attention.prior, attention.prior.requires_grad) for attention in attentions if attention.prior is not None
    ]
    for prior, _ in earlier:
        prior.requires_grad_(needed)
    try:
        yield
    finally:
        for prior, needs in earlier:
            prior.requires_grad_(needs)


@contextmanager
def _with_priors(attentions: Iterable[PriorAttention]) -> Iterator[None]:
    """Priors that need gradients, uniform ones where there are none; all as it was again afterwards."""
    attentions = list(attentions)
    plain = [(attention, attention.parameterization) for attention in attentions if attention.prior is None]
    for attention, _ in plain:
        shape = (attention.groups, attention.num_heads, attention.num_queries, attention.num_keys)
        attention.kind, attention.parameterization = "fiak", "softmax"
        attention.prior = nn.Parameter(torch.zeros(shape, device=attention.eligible().device))
    try:
        with _requiring_grad(attentions, True):
            yield
    finally:
        for attention, parameterization in plain:
            attention.kind, attention.parameterization = "softmax", parameterization
            attention.prior = None
