"""What the ops are compared with: other ways to compute the same attention in PyTorch.

Every function takes what is known ahead of time and returns a call of query ``[B, Hq, N, D]``, key ``[B, H, M, D]``,
value ``[B, H, M, Dv]`` and, where it says so, further tensors that may want gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import Case

__all__ = ["Attention", "compiled_flex", "eager", "flex", "sdpa", "sdpa_bool_mask", "sdpa_float_bias", "torch_sparse"]

Attention = Callable[..., Tensor]


def sdpa(case: Case) -> Attention:
    """Dense ``scaled_dot_product_attention``."""
    return partial(scaled_dot_product_attention, is_causal=case.is_causal, enable_gqa=_grouped(case))


def sdpa_bool_mask(case: Case, mask: Tensor) -> Attention:
    """SDPA with a boolean mask ``[Hq, N, M]``, given in four dimensions: three would take a slow path."""
    return partial(scaled_dot_product_attention, attn_mask=mask[None], enable_gqa=_grouped(case))


def sdpa_float_bias(case: Case) -> Attention:
    """SDPA with a further argument: an additive bias ``[1, Hq, N, M]``, the logarithm of the prior."""
    return partial(scaled_dot_product_attention, enable_gqa=_grouped(case))


def compiled_flex() -> Attention:
    """FlexAttention, compiled, for sizes that do not change: what :func:`flex` of other masks can share."""
    torch._dynamo.reset()  # else shapes of an earlier case become dynamic
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex(case: Case, mask: Tensor, compiled: Attention | None = None, backend: str | None = None) -> Attention:
    """FlexAttention, compiled, with the block mask of ``mask [Hq, N, M]``. It has no backward on CPU.

    Args:
        compiled: of :func:`compiled_flex`, by default a new one.
        backend: what computes it on CUDA, for example ``"FLASH"``; by default Triton.
    """

    def keeps(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[head, query, key]

    blocks = create_block_mask(keeps, None, case.query_heads, case.queries, case.keys, device=mask.device)
    options = {} if backend is None else {"kernel_options": {"BACKEND": backend}}
    return partial(compiled or compiled_flex(), block_mask=blocks, enable_gqa=_grouped(case), **options)


def eager(query: Tensor, key: Tensor, value: Tensor, prior: Tensor) -> Tensor:
    """``exp(s) * prior``, normalised, in single operations; prior is ``[1, Hq, N, M]``, 0 where pruned."""
    groups = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.size(3))
    weights = (scores - scores.amax(3, keepdim=True)).exp() * prior
    return (weights / weights.sum(3, keepdim=True)).to(value.dtype) @ value


def torch_sparse(case: Case, mask: Tensor) -> Attention:
    """``torch.sparse``: CSR products, and the softmax through COO because CSR has none on CPU. Float32 only.

    All batch elements and heads are one block-diagonal matrix; its indices are made ahead of time.
    """
    blocks = case.batch * case.query_heads
    rows, columns = blocks * case.queries, blocks * case.keys
    kept = mask.expand(case.batch, -1, -1, -1).reshape(rows, case.keys)
    row, column = kept.nonzero().unbind(1)
    column = column + row // case.queries * case.keys
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    places = torch.stack([row, column])
    csr = partial(torch.sparse_csr_tensor, offsets, column, size=(rows, columns), check_invariants=False)
    zeros = csr(torch.zeros(len(column)))
    groups = case.query_heads // case.key_heads

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
        query, key, value = (x.reshape(-1, x.size(3)) for x in (query, key, value))
        scores = torch.sparse.sampled_addmm(zeros, query, key.t(), beta=0.0, alpha=case.head_dim**-0.5)
        matrix = torch.sparse_coo_tensor(
            places, scores.values(), (rows, columns), check_invariants=False, is_coalesced=True
        )
        weights = torch.sparse.softmax(matrix, 1).values()
        output: Tensor = csr(weights) @ value
        return output.view(case.batch, case.query_heads, case.queries, case.value_dim)

    return attention


def _grouped(case: Case) -> bool:
    return case.query_heads != case.key_heads
