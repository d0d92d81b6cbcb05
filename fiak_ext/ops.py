"""The operators as functions: what to call with query, key, value and a mask or prior of one's own.

They are thin: each calls the operator of its name in ``torch.ops.fiak``, whose schema is the contract. What they add is
documentation, types, a seed for dropout, and a plan, made once and kept, for a pattern. All are differentiable in every
floating-point input, take any strides, give the same bits with any number of threads, and work under autocast and
``torch.compile(fullgraph=True)``. Second derivatives are refused. :mod:`fiak_ext.reference` has them in plain torch.

Sizes: B batch elements, Hq query heads, H key heads, of which Hq is a multiple (query head ``h`` reads key head
``h // (Hq // H)``), N queries, M keys, D features of a query or key, Dv of a value.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fiak_ext.pattern import SparsePattern

__all__ = ["Score", "compact_kv", "compact_linear", "csr_attention", "prior_attention"]

Score = Literal["dot", "gaussian"]


def prior_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prior: Tensor | None = None,
    *,
    is_causal: bool = False,
    kv_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
    score: Score = "dot",
    log_prior: bool = False,
) -> Tensor:
    """Computes attention with a weight for every pair of query and key (Eq. 12 of the paper).

    ``output_i = sum_j a_ij value_j`` with ``a_ij = w_ij exp(s_ij) / sum_j' w_ij' exp(s_ij')``. No tensor of B x Hq x N
    x M elements is made, neither here nor in backward. Weights are relative: only their ratios among the keys that a
    query sees matter. A query that sees no key of positive weight gets 0.

    Args:
        query: ``[B, Hq, N, D]``; float64, float32, bfloat16 or float16 (on CUDA not float64).
        key: ``[B, H, M, D]``, of the same dtype.
        value: ``[B, H, M, Dv]``, of the same dtype.
        prior: the weights w, ``[G, 1 | Hq, 1 | N, M]``, float32 (float64 with a float64 query); G divides B, and
            element b uses group ``b % G``. A weight of 0 or less hides its pair. None is plain attention, all ones.
        is_causal: query i sees keys ``j <= i`` only.
        kv_lens: int32 or int64 ``[B]``, the number of keys of each batch element; those behind are never read.
        dropout_p: probability, 0..1, of dropping a normalised weight; the others are divided by ``1 - dropout_p``.
        seed: int64, one element, which says what is dropped: the same pairs on every device, by every number of
            threads. By default it is drawn from torch's generator of query's device, if ``dropout_p > 0``.
        scale: factor of the scores, by default ``1 / sqrt(D)``.
        score: ``"dot"``, ``s_ij = scale q_i.k_j``, or ``"gaussian"``, ``s_ij = -scale/2 |q_i - k_j|^2`` (Eq. 8).
        log_prior: prior holds ``ln w``, that is an additive bias; -inf hides its pair.

    Returns:
        ``[B, Hq, N, Dv]``, of the dtype of query, in the memory order ``[B, N, Hq, Dv]``.

    Raises:
        RuntimeError: a shape, dtype, device or value that is not as said above; the message names it.

    Example:
        >>> import torch
        >>> from fiak_ext import ops
        >>> query, key, value = torch.randn(3, 2, 4, 10, 16).unbind()  # B = 2, Hq = H = 4, N = M = 10, D = Dv = 16
        >>> prior = torch.rand(1, 4, 10, 10, requires_grad=True)
        >>> output = ops.prior_attention(query, key, value, prior)
        >>> output.shape
        torch.Size([2, 4, 10, 16])
        >>> output.sum().backward()
        >>> prior.grad.shape
        torch.Size([1, 4, 10, 10])

        The same by torch, whose float mask holds logarithms:

        >>> expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, prior.log())
        >>> torch.allclose(output, expected, atol=1e-5)
        True
    """
    output: Tensor = torch.ops.fiak.prior_attention(
        query,
        key,
        value,
        prior,
        is_causal=is_causal,
        kv_lens=kv_lens,
        dropout_p=dropout_p,
        seed=_seed_for(dropout_p, query) if seed is None else seed,
        scale=scale,
        score=score,
        log_prior=log_prior,
    )
    return output


def csr_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: SparsePattern | Tensor,
    prior: Tensor | None = None,
    *,
    query_offsets: Tensor | None = None,
    kv_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
    score: Score = "dot",
    log_prior: bool = False,
) -> Tensor:
    """Computes attention over the pairs of a sparse pattern only, in time and memory proportional to their number.

    ``output_i = sum_j a_ij value_j`` with ``a_ij = w_ij exp(s_ij) / sum_j' w_ij' exp(s_ij')``, where j and j' are the
    keys that the pattern keeps for query i of this head. A query that keeps no key gets 0.

    A loop wants a :class:`~fiak_ext.SparsePattern` that is made once: it keeps the plan that the kernels read, which
    its first call makes. Of a mask, pattern and plan are made anew in every call: that takes time, waits for a CUDA
    device, and does not compile.

    Args:
        query: ``[B, Hq, N, D]``; float64, float32, bfloat16 or float16 (on CUDA not float64).
        key: ``[B, H, M, D]``, of the same dtype; M is at most the pattern's ``num_keys``, keys behind M are hidden.
        value: ``[B, H, M, Dv]``, of the same dtype.
        pattern: of Hq heads and, without ``query_offsets``, N queries; or a bool mask, True where kept, ``[1 | Hq, N,
            M]`` or ``[groups, 1 | Hq, N, M]``. The number of groups divides B; element b uses group ``b % groups``.
        prior: the weights w of the pattern's pairs ``[nnz]``, float32 (float64 with a float64 query), in the order of
            its ``col_indices``: ``SparsePattern.entries`` takes them out of a tensor of all pairs. A weight of 0 or
            less hides its pair. None is all ones.
        query_offsets: int32 or int64 ``[B]``: query n of element b is row ``n + query_offsets[b]`` of the pattern
            (cached decoding).
        kv_lens: int32 or int64, the number of keys ``[B]`` of each batch element, or ``[B, H]`` of each of its key
            heads; those behind are never read.
        dropout_p, seed, scale, score: as for :func:`prior_attention`.
        log_prior: prior holds ``ln w``, that is an additive bias; -inf hides its pair.

    Returns:
        ``[B, Hq, N, Dv]``, of the dtype of query; in the memory order ``[B, N, Hq, Dv]`` unless kv_lens is ``[B, H]``.

    Raises:
        TypeError: a mask that is not boolean.
        ValueError: a query or mask with another number of dimensions, or heads that do not belong together.
        RuntimeError: anything else that is not as said above; the message names it.

    Example:
        >>> import torch
        >>> from fiak_ext import SparsePattern, ops
        >>> query, key, value = torch.randn(3, 2, 4, 10, 16).unbind()  # B = 2, Hq = H = 4, N = M = 10, D = Dv = 16
        >>> mask = torch.rand(4, 10, 10) < 0.3
        >>> mask |= torch.eye(10, dtype=torch.bool)  # each query keeps its own key at least
        >>> pattern = SparsePattern.from_mask(mask)  # once
        >>> for _ in range(3):
        ...     output = ops.csr_attention(query, key, value, pattern)
        >>> output.shape
        torch.Size([2, 4, 10, 16])
        >>> torch.equal(output, ops.csr_attention(query, key, value, mask))
        True

        The same by torch:

        >>> expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
        >>> torch.allclose(output, expected, atol=1e-5)
        True

        A bias, such as one for relative positions, joins by its entries at the pairs that are kept:

        >>> bias = torch.randn(1, 4, 10, 10, requires_grad=True)
        >>> output = ops.csr_attention(query, key, value, pattern, pattern.entries(bias), log_prior=True)
        >>> output.sum().backward()
        >>> bool((bias.grad[0][~mask] == 0).all())
        True
    """
    if isinstance(pattern, Tensor):
        pattern = SparsePattern.from_mask(pattern, query.size(1) if query.dim() == 4 else None)
    return pattern.attend(
        query,
        key,
        value,
        prior,
        query_offsets=query_offsets,
        kv_lens=kv_lens,
        dropout_p=dropout_p,
        seed=_seed_for(dropout_p, query) if seed is None else seed,
        scale=scale,
        score=score,
        log_prior=log_prior,
    )


def compact_kv(key: Tensor, value: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the rows of key and value that a compacted pattern needs: ``key_c[b, h, k] = key[b, h, keep[h, k]]``.

    Args:
        key: ``[B, H, M, D]``; float64, float32, bfloat16 or float16.
        value: ``[B, H, M, Dv]``, of the same dtype.
        keep: int64 ``[H, K]``, the kept rows of each head, ascending, padded at the end with -1, which gives rows of
            zeros; ``SparsePattern.compact`` returns it.

    Returns:
        ``[B, H, K, D]`` and ``[B, H, K, Dv]``.

    Raises:
        RuntimeError: a shape, dtype, device or row that is not as said above; the message names it.

    Example:
        >>> import torch
        >>> from fiak_ext import SparsePattern, ops
        >>> query, key, value = torch.randn(3, 2, 4, 10, 16).unbind()
        >>> pattern = SparsePattern.from_window(4, 10, window_size=(0, 0), num_sinks=2)  # the own key and the first two
        >>> needed, keep = pattern.crop(5, 10).compact()  # of the first five queries
        >>> keep.tolist()[0]
        [0, 1, 2, 3, 4]
        >>> output = ops.csr_attention(query[:, :, :5], *ops.compact_kv(key, value, keep), needed)
        >>> torch.allclose(output, ops.csr_attention(query, key, value, pattern)[:, :, :5], atol=1e-5)
        True
    """
    kept: tuple[Tensor, Tensor] = torch.ops.fiak.compact_kv(key, value, keep)
    return kept


def compact_linear(input: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor) -> Tensor:
    """Projects the rows that a compacted pattern needs: ``out[b, h, k] = W_h input[b, keep[h, k]] + b_h``.

    No other rows are computed.

    Args:
        input: the tokens ``[B, M, Dx]``; float64, float32, bfloat16 or float16.
        weight: ``[H * D, Dx]``, of the same dtype, as that of a linear layer to key or value; head h has the rows from
            ``h * D`` on.
        bias: ``[H * D]``, of the same dtype, or None.
        keep: as for :func:`compact_kv`.

    Returns:
        ``[B, H, K, D]``.

    Raises:
        RuntimeError: a shape, dtype, device or row that is not as said above; the message names it.

    Example:
        >>> import torch
        >>> from fiak_ext import ops
        >>> tokens, layer = torch.randn(2, 10, 64), torch.nn.Linear(64, 64)
        >>> keep = torch.tensor([[0, 3, 7], [1, 2, -1], [5, 6, 9], [4, -1, -1]])  # of four heads
        >>> key = ops.compact_linear(tokens, layer.weight, layer.bias, keep)
        >>> key.shape
        torch.Size([2, 4, 3, 16])
        >>> all_keys = layer(tokens).unflatten(2, (4, 16)).transpose(1, 2)
        >>> torch.allclose(key[:, 0], all_keys[:, 0, [0, 3, 7]], atol=1e-5)
        True
    """
    output: Tensor = torch.ops.fiak.compact_linear(input, weight, bias, keep)
    return output


def _seed_for(dropout_p: float, query: Tensor) -> Tensor | None:
    """Draws a seed from torch's generator of query's device where something is dropped."""
    return torch.randint(2**63 - 1, (1,), device=query.device) if dropout_p > 0 else None
