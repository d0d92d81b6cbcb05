"""The memory of attention and of whole models, in bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

__all__ = ["attention_memory", "model_memory", "peak_memory"]


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
