"""What data say about pairs: mean posterior attention, saliency, soft EM, and rows that cannot reach the loss.

``calibrate`` measures what ``prune(..., importance="posterior")`` and ``"gradient"`` rank by; :class:`SoftEM` trains
priors without gradients; ``find_dead_rows`` finds what ``prune(..., dead_rows=...)`` removes for free.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, Literal, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor, distributed, nn

from fiak_ext.measure import dense_attentions, evaluating
from fiak_ext.nn import Kind, Parameterization, PriorAttention

__all__ = ["SoftEM", "arguments_of", "calibrate", "find_dead_rows"]

Measured: TypeAlias = Literal["posterior", "gradient"]
Forward: TypeAlias = Callable[[nn.Module, Any], object]
Recorder: TypeAlias = Callable[[Tensor, Tensor, Mapping[str, Any]], None]

_CHUNK_BYTES = 1 << 19  # of float64 attention that a recorder holds at a time: it stays in the cache
_NO_WEIGHT = math.log(torch.finfo(torch.float32).tiny)  # -87.3, a bias below its row's largest that hides a pair


@torch.inference_mode(False)  # the modules keep what is made here
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
    they have no weight in float32: Swin's -100 between the parts of a shifted window. The attention of a sample is
    computed in float64 and added to a sum in float32, sample by sample, so that the mean does not depend on how samples
    are batched; the sums become the results, and nothing of their size is held beside them. With pattern groups, sample
    b of a batch counts for group ``b % groups``, as in attention. Sets, on every module, ``posterior`` or ``saliency``
    (float32, ``[groups, heads, N, M]``, 0 where never visible) and ``reached`` (int64, the same shape: the samples
    behind each mean). An earlier calibration of the same importance is replaced.

    ``"posterior"``: ``mean_b a_ij``, without gradients. ``"gradient"``: ``-mean_b dL/dlog w_ij`` at the present weights
    w: to first order, how much the loss rises when the weight of the pair shrinks by a factor of e; a gradient step
    from uniform priors has this direction. Modules without a prior (``kind="softmax"``) take part with a uniform one.
    The gradient of a GMM prior is that of its key, shared by all queries.

    Under data parallelism, with ``torch.distributed`` initialised, every rank calls this with its share of the data,
    which may be none at all. Sums and counts are reduced over the ranks, so that all get what one process gets from all
    data (to the rounding of the sums). Pass the model itself, not its ``DistributedDataParallel``. Compiled models, and
    compiled parts of models, run eagerly here.

    Args:
        model: holds at least one ``PriorAttention`` of any kind, and no pruned one.
        batches: the inputs: a list of batches (of one: ``[batch]``), a data loader or another iterable; a few batches
            of typical ones suffice.
        importance: what to measure.
        forward: called as ``forward(model, batch)``. The default takes of a tuple or list (a data loader's inputs and
            targets) the first item, and passes a mapping as keyword arguments and anything else as it is. With
            ``"gradient"`` it returns the loss, summed over the samples of the batch (a mean is as good if all batches
            have one size).

    Raises:
        ValueError: an unknown importance, no ``PriorAttention`` or a pruned one, no batches, one batch in the place of
            several (a Tensor, a mapping, inputs and targets), a ``PriorAttention`` that no batch ran through, or a
            forward that returns no loss where one is needed. Whatever is raised, earlier calibrations, modes, recorders
            and priors are left as they were.

    Source: the posterior of Section 2.1 averaged over data. For a pretrained model, whose uniform prior says nothing,
    it is the importance to rank by without any training. The saliency is the first-order term of the loss in log w, as
    in Molchanov et al. (2017), with its sign.
    """
    if importance not in ("posterior", "gradient"):
        raise ValueError(f"calibrate: importance must be 'posterior' or 'gradient' (got {importance!r})")
    attentions = dense_attentions("calibrate", model)
    batches = _iterable(batches)
    run = _run_batch if forward is None else forward
    means: Mapping[str, _Mean]
    stand_ins: list[Tensor] = []
    seen, first = 0, None
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if importance == "posterior":
            stack.enter_context(torch.no_grad())
            means = {name: _MeanPosterior(attention, torch.float32) for name, attention in attentions.items()}
        else:
            stack.enter_context(torch.enable_grad())
            saliencies = {name: _MeanSaliency(attention, torch.float32) for name, attention in attentions.items()}
            stand_ins = stack.enter_context(_stand_ins(saliencies.values()))
            means = saliencies
        stack.enter_context(_recording(attentions, means))
        for batch in batches:
            if forward is None:
                first = _form(batch) if first is None else first
                _expect_alike(first, batch)
            result = run(model, batch)
            seen += 1
            if importance == "gradient":
                _checked_loss(result).backward(inputs=stand_ins)
            del result
    totals = [torch.tensor(seen, device=next(iter(means.values())).calls.device)]
    totals += [mean.calls for mean in means.values()]
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
    training mode computes its attention a second time, in float64 (compiled models too)::

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
            name: _MeanPosterior(attention, torch.float64, only_training=True)
            for name, attention in self._attentions.items()
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
        _reduce([mean.calls for mean in self._means.values()])
        idle = [name for name, mean in self._means.items() if not mean.calls]
        if idle:
            raise RuntimeError(
                "SoftEM.step: a forward pass in training mode must come first "
                f"(none ran through {', '.join(map(repr, idle))})"
            )
        for name, attention in self._attentions.items():
            self._means[name].reduce()
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
    if attention.parameterization == "logits":
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
    present = {name: _Rows(attention) for name, attention in attentions.items()}
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
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_recording(attentions, present))
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

    alive = {name: torch.zeros_like(rows.seen).expand(rows.heads_shape).clone() for name, rows in present.items()}
    for (name, _, first), gradient in zip(probes, gradients, strict=True):
        if gradient is None:
            continue
        groups = attentions[name].groups
        for sample, start in enumerate(first.tolist()):
            reached = (gradient[sample] != 0).any(-1)
            alive[name][sample % groups, :, start : start + reached.size(1)] |= reached
    return {name: rows.seen & ~alive[name] for name, rows in present.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Recorders


class _Place(NamedTuple):
    """Where the queries and keys of one sample of a recorded forward pass belong."""

    group: int
    start: int  # row of the first query
    queries: int  # that are not padding
    keys: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.queries)

    @property
    def columns(self) -> slice:
        return slice(self.keys)


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


def _shown(bias: Tensor | None) -> Tensor | None:
    """bool [1 | groups, 1, N, M]: the pairs that an added bias leaves a weight, in any head; None: all of them."""
    return None if bias is None else (bias - bias.amax(-1, keepdim=True) > _NO_WEIGHT).any(1, keepdim=True)


class _Rows:
    """The rows of attention that some sample has, with a key to see; called as a module's recorder.

    Attributes:
        seen: bool [groups, 1, N].
    """

    def __init__(self, attention: PriorAttention) -> None:
        self.attention = attention
        self.heads_shape = (attention.groups, attention.num_heads, attention.num_queries)
        self.seen = torch.zeros(attention.groups, 1, attention.num_queries, dtype=torch.bool, device=attention._device)

    @torch.no_grad()
    def __call__(self, query: Tensor, key: Tensor, options: Mapping[str, Any]) -> None:
        shown = _shown(options["bias"])
        for place in _places(self.attention, query, key, options):
            if shown is not None:
                visible = shown[place.group % shown.size(0), :, place.rows, place.columns].any(-1)
                self.seen[place.group, :, place.rows] |= visible
            elif place.keys > 0:
                self.seen[place.group, :, place.rows] = True


_means: WeakValueDictionary[int, _Mean] = WeakValueDictionary()
_numbers = count()


@torch.library.custom_op(
    "fiak_ext::record",
    mutates_args=("calls",),
    schema="(int number, Tensor(a!) calls, Tensor query, Tensor key, Tensor? kv_lens, Tensor? query_offsets, "
    "Tensor? bias) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _record(number: int, calls: Tensor, query: Tensor, key: Tensor, *options: Tensor | None) -> None:
    """What a recorder does within compiled code, which neither looks into it nor drops it, as it changes ``calls``."""
    _means[number].record(query, key, dict(zip(("kv_lens", "query_offsets", "bias"), options, strict=True)))
    calls += 1


class _Mean:
    """Sum over samples of something that every pair has, and the number of samples; called as a module's recorder.

    Attributes:
        total: [groups, heads, N, M], of the dtype that is asked for.
        samples: int64 [groups, 1, N, M], causality left out.
        calls: int64 [].
    """

    def __init__(self, attention: PriorAttention, dtype: torch.dtype, only_training: bool = False) -> None:
        self.attention = attention
        self.only_training = only_training
        self.heads_shape = (attention.groups, attention.num_heads, attention.num_queries, attention.num_keys)
        device = attention._device
        self.total = torch.zeros(self.heads_shape, dtype=dtype, device=device)
        self.samples = torch.zeros(attention.groups, 1, *self.heads_shape[2:], dtype=torch.int64, device=device)
        self.calls = torch.zeros((), dtype=torch.int64, device=device)
        self.number = next(_numbers)
        _means[self.number] = self

    def __call__(self, query: Tensor, key: Tensor, options: Mapping[str, Any]) -> None:
        if self.only_training and not self.attention.training:
            return
        if torch.compiler.is_compiling():
            bias = options["bias"]
            bias = None if bias is None else bias.detach()
            arguments = (query.detach(), key.detach(), options["kv_lens"], options["query_offsets"], bias)
            torch.ops.fiak_ext.record(self.number, self.calls, *arguments)
        else:
            self.record(query, key, options)
            self.calls += 1

    @torch.no_grad()
    def record(self, query: Tensor, key: Tensor, options: Mapping[str, Any]) -> None:
        """Adds the samples of a batch, in their order."""
        places = _places(self.attention, query, key, options)
        shown = _shown(options["bias"])
        for place, times in Counter(places).items():
            seen = 1 if shown is None else shown[place.group % shown.size(0), :, place.rows, place.columns]
            self.samples[place.group, :, place.rows, place.columns] += seen * times
        for sample, place in enumerate(places):
            if place.queries > 0 and place.keys > 0:
                self.add(query[sample, :, : place.queries], key[sample, :, : place.keys], place, options["bias"])

    def add(self, query: Tensor, key: Tensor, place: _Place, bias: Tensor | None) -> None:
        """Adds what the queries [heads, n, D] and keys [key heads, m, D] of one sample give."""

    def clear(self) -> None:
        for tensor in (self.total, self.samples, self.calls):
            tensor.zero_()

    def reduce(self) -> None:
        """Sums over all ranks; after this, no samples are added."""
        if _is_distributed():
            total = self.total.double()
            _reduce([total, self.samples])
            self.total.copy_(total)

    def visible_samples(self) -> Tensor:
        """int64 [groups, heads, N, M]: the samples in which each pair is visible."""
        return (self.samples.tril() if self.attention.is_causal else self.samples).expand(self.heads_shape)

    def result(self) -> tuple[Tensor, Tensor]:
        """The mean, float32, and ``reached``, as ``calibrate`` sets them, in the place of the sums."""
        self.reduce()
        mean = self.total.div_(self.samples.clamp(min=1))
        if self.attention.is_causal:
            self.samples.tril_()
        return mean, self.samples.expand(self.heads_shape)


class _MeanPosterior(_Mean):
    """Of the attention ``a_ij`` of Eq. 12."""

    def add(self, query: Tensor, key: Tensor, place: _Place, bias: Tensor | None) -> None:
        attention = self.attention
        heads, queries, head_dim = query.shape
        scale = head_dim**-0.5 if attention.scale is None else attention.scale
        keys = key.double()
        length = None if attention.score == "dot" else scale / 2 * keys.square().sum(-1)[:, None]
        chunk = max(1, _CHUNK_BYTES // (8 * heads * place.keys))
        for first in range(0, queries, chunk):
            part = query[:, first : first + chunk].double()
            rows = slice(place.start + first, place.start + first + part.size(1))
            # What is behind the last row is hidden from all of them.
            columns = slice(min(place.keys, rows.stop) if attention.is_causal else place.keys)
            score = part.reshape(key.size(0), -1, head_dim) @ keys[:, columns].mT
            score *= scale
            if length is not None:  # |q|^2 cancels in the normalisation
                score -= length[..., columns]
            score = score.view(heads, -1, columns.stop)
            if bias is not None:
                score += bias[place.group % bias.size(0), :, rows, columns]
            if attention.prior is not None:
                score += _log_weight(attention, place.group, rows, columns)
            if attention.is_causal:
                row, column = (torch.arange(x.stop, device=score.device) for x in (rows, columns))
                score.masked_fill_(column > row[rows, None], -math.inf)
            largest = score.amax(-1, keepdim=True)
            score -= largest.masked_fill_(largest == -math.inf, 0)
            total = score.exp_().sum(-1, keepdim=True)
            score /= total.masked_fill_(total == 0, 1)  # a row without support
            self.total[place.group, :, rows, columns] += score


def _log_weight(attention: PriorAttention, group: int, rows: slice, columns: slice) -> Tensor:
    """float64 [heads, 1 | rows, columns]: the logarithm of the weights, up to a term for each row, -inf for 0."""
    assert attention.prior is not None
    prior = attention.prior[group, :, slice(1) if attention.kind == "gmm" else rows, columns].double()
    return prior.abs().clamp(max=1).log() if attention.parameterization == "clamp" else prior


class _MeanSaliency(_Mean):
    """Of ``-dL/dlog w``; the recorder only counts samples, backward adds the sums over a batch by :meth:`take`."""

    @torch.no_grad()
    def take(self, prior: Tensor) -> None:
        """Adds the gradient of the prior, as soon as it is there, so that one layer's is held at a time."""
        assert prior.grad is not None
        # The gradient of the logits of a softmax is that of log w, whose sum over a row is 0.
        gradient, prior.grad = prior.grad, None
        if self.attention.parameterization == "clamp":
            gradient *= prior
        self.total -= gradient


def _checked_loss(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"calibrate: forward must return the loss, a Tensor of one element with gradient (got {what})")
    return loss


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """What a batch calls a model with, positional and by name.

    A mapping goes in as keyword arguments, of a tuple or list the first item, anything else as it is.
    """
    if isinstance(batch, (tuple, list)):
        batch = batch[0]
    return ((), batch) if isinstance(batch, Mapping) else ((batch,), {})


def _run_batch(model: nn.Module, batch: Any) -> object:
    args, kwargs = arguments_of(batch)
    return model(*args, **kwargs)


def _iterable(batches: Any) -> Iterable[Any]:
    """Refuses one batch in the place of many."""
    one = isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable)
    if one or (isinstance(batches, tuple) and any(isinstance(item, Tensor) for item in batches)):
        raise ValueError(
            "calibrate: batches must be a list or another iterable of batches, [batch] if it is one "
            f"(got {_text(_form(batches))})"
        )
    return batches


def _form(batch: Any) -> tuple[Any, ...]:
    """What batches of one data set have in common."""
    if isinstance(batch, Tensor):
        return type(batch), batch.dim(), batch.dtype.is_floating_point
    return (type(batch),)


def _expect_alike(first: tuple[Any, ...], batch: Any) -> None:
    """Refuses inputs and labels of one batch in the place of two batches, as far as they can be told apart."""
    if (form := _form(batch)) != first:
        raise ValueError(
            "calibrate: batches must be alike, and one batch with inputs and labels is [(inputs, labels)] "
            f"(got {_text(form)} after {_text(first)})"
        )


def _text(form: tuple[Any, ...]) -> str:
    kind, *rest = form
    if not rest:
        return f"a {kind.__name__}"
    dim, is_floating_point = rest
    return f"a Tensor of {'floating-point numbers' if is_floating_point else 'integers'} with {dim} dimensions"


# ---------------------------------------------------------------------------------------------------------------------
# The model around it


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _reduce(tensors: list[Tensor]) -> None:
    """Sums tensors over all ranks, in place, where torch.distributed is in use."""
    if _is_distributed():
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
def _recording(attentions: Mapping[str, PriorAttention], recorders: Mapping[str, Recorder]) -> Iterator[None]:
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
def _stand_ins(means: Iterable[_MeanSaliency]) -> Iterator[list[Tensor]]:
    """Priors whose gradients go to the means, uniform ones where there are none; all as it was again afterwards.

    The priors themselves, their gradients and hooks are not touched.
    """
    earlier: list[tuple[PriorAttention, Kind, Parameterization, nn.Parameter | None]] = []
    stand_ins: list[Tensor] = []
    try:
        for mean in means:
            attention, prior = mean.attention, mean.attention.prior
            earlier.append((attention, attention.kind, attention.parameterization, prior))
            if prior is None:
                attention.kind, attention.parameterization = "fiak", "logits"
            uniform = torch.zeros((), device=attention._device).expand(mean.heads_shape)
            attention.prior = nn.Parameter(uniform if prior is None else prior.detach())
            attention.prior.register_post_accumulate_grad_hook(mean.take)
            stand_ins.append(attention.prior)
        yield stand_ins
    finally:
        for attention, kind, parameterization, prior in earlier:
            attention.kind, attention.parameterization, attention.prior = kind, parameterization, prior
