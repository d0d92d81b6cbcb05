"""The ops of ``torch.ops.fiak`` in plain float64 torch: slow, short, and the truth for all tests.

Every function takes any floating dtype, computes and returns float64, and is differentiable by autograd. The attentions
compute in another ``dtype`` on demand: the eager baseline that kernels' errors are compared with. Shapes and meanings
are those of the ops: ``query [B, Hq, N, D]``, ``key [B, H, M, D]``, ``value [B, H, M, Dv]``, where ``Hq`` is a multiple
of ``H`` and query head ``h`` reads key head ``h // (Hq // H)``. Arguments are not validated.
"""

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["compact_kv", "compact_linear", "csr_attention", "philox_keep_mask", "prior_attention"]


def prior_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prior: Tensor | None = None,
    *,
    is_causal: bool = False,
    kv_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    scale: float | None = None,
    score: str = "dot",
    log_prior: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention with a weight for every pair: ``a_ij = w_ij exp(s_ij) / sum_j' w_ij' exp(s_ij')`` (Eq. 12).

    Args:
        prior: the weights ``w [G, 1|Hq, 1|N, M]``; batch element ``b`` uses group ``b % G``. ``w <= 0`` is outside the
            support, and still has the gradient ``exp(s_ij - lse_i) (dA_ij - delta_i)``. None is softmax attention.
        is_causal: query ``i`` sees keys ``j <= i``.
        kv_lens: ``[B]``, the number of keys of each batch element; those behind are never read.
        dropout_p: probability of dropping a normalised weight, by the mask of :func:`philox_keep_mask`.
        scale: factor of the scores, by default ``1 / sqrt(D)``.
        score: ``"dot"``, ``s = scale q.k``, or ``"gaussian"``, ``s = -scale/2 |q-k|^2`` (Eq. 8) without the ``|q|^2``
            term, which cancels.
        log_prior: ``prior`` holds ``ln w``, any number or -inf, which is outside the support and has gradient 0.
        dtype: what to compute in and to return.

    Returns:
        output ``[B, Hq, N, Dv]`` and logsumexp ``[B, Hq, N]``; 0 and -inf for a row without support.
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    eligible = torch.ones(batch, heads, queries, keys, dtype=torch.bool, device=query.device)
    if is_causal:
        eligible = eligible.tril()
    if prior is None:
        weight = torch.full_like(eligible, 0 if log_prior else 1, dtype=dtype)
    else:
        group = torch.arange(batch, device=query.device) % max(prior.shape[0], 1)
        weight = prior.to(dtype)[group].expand(batch, heads, queries, keys)
    kept = philox_keep_mask(seed, dropout_p, batch, heads, queries, keys) if dropout_p > 0 else None
    return _attention(query, key, value, weight, eligible, kv_lens, kept, dropout_p, scale, score, log_prior)


def csr_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    prior: Tensor | None = None,
    *,
    query_offsets: Tensor | None = None,
    num_queries: int | None = None,
    kv_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    scale: float | None = None,
    score: str = "dot",
    log_prior: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention over the pairs of a CSR pattern only, computed densely.

    Args:
        crow_indices: ``[G * Hq * num_queries + 1]``, row offsets, or ``[G * num_queries + 1]``, G not a multiple of
            Hq, where all query heads share a pattern; batch element ``b`` uses group ``b % G``.
        col_indices: ``[nnz]``, the keys of each row; those that ``key`` does not have are hidden.
        prior: ``[nnz]``, the weights of the pairs, or None for all ones.
        query_offsets: ``[B]``; query ``n`` of element ``b`` uses row ``n + query_offsets[b]`` of its head.
        num_queries: rows of the pattern for each head, by default ``N``.

    The other arguments and the result are those of :func:`prior_attention`.
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    device = query.device
    num_queries = queries if num_queries is None else num_queries
    num_rows = crow_indices.numel() - 1
    row = torch.repeat_interleave(torch.arange(num_rows, device=device), crow_indices.long().diff())
    there = col_indices < keys
    entry = row[there] * keys + col_indices[there].long()
    one = 0.0 if log_prior else 1.0
    weight = torch.full(entry.shape, one, device=device) if prior is None else prior[there]
    dense = torch.zeros(num_rows * keys, dtype=dtype, device=device).index_put((entry,), weight.to(dtype))
    pattern = torch.zeros(num_rows * keys, dtype=torch.bool, device=device).index_fill(0, entry, True)

    pattern_heads = num_rows // max(num_queries, 1)
    of_group = heads if pattern_heads % max(heads, 1) == 0 else 1  # one that all query heads share
    groups = pattern_heads // max(of_group, 1)
    group = torch.arange(batch, device=device)[:, None, None] % max(groups, 1)
    head = torch.arange(heads, device=device)[:, None]
    offset = torch.zeros(batch, dtype=torch.long, device=device) if query_offsets is None else query_offsets.long()
    query_row = torch.arange(queries, device=device) + offset[:, None, None]  # [B, 1, N]
    which = (group, head if of_group == heads else torch.zeros_like(head), query_row)
    shape = (groups, of_group, num_queries, keys)

    kept = None
    if dropout_p > 0:
        kept = philox_keep_mask(seed, dropout_p, batch, heads, num_queries, keys)
        kept = kept[torch.arange(batch, device=device)[:, None, None], head, query_row]
    eligible = pattern.view(shape)[which]
    # A key that no query keeps is never read, whatever it holds.
    read = eligible.any(2).view(batch, key.shape[1], heads // max(key.shape[1], 1), keys).any(2)[..., None]
    key, value = torch.where(read, key, 0), torch.where(read, value, 0)
    weight = dense.view(shape)[which]
    return _attention(query, key, value, weight, eligible, kv_lens, kept, dropout_p, scale, score, log_prior)


def compact_kv(key: Tensor, value: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The kept rows of each key head: ``[B, H, M, *] -> [B, H, K, *]``.

    Args:
        keep: int64 ``[H, K]``, ascending in each row, padded at the end with -1, which gives rows of zeros.
    """
    return _take_rows(key.double(), keep), _take_rows(value.double(), keep)


def compact_linear(input: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor) -> Tensor:
    """A linear layer of ``H`` heads for the kept rows of each head: ``[B, M, Dx] -> [B, H, K, D]``.

    Args:
        input: ``[B, M, Dx]``.
        weight: ``[H * D, Dx]``.
        bias: ``[H * D]`` or None.
        keep: as in :func:`compact_kv`.
    """
    projected = torch.nn.functional.linear(input.double(), weight.double(), None if bias is None else bias.double())
    batch, rows, features = projected.shape
    heads = keep.shape[0]
    return _take_rows(projected.view(batch, rows, heads, features // max(heads, 1)).transpose(1, 2), keep)


def philox_keep_mask(
    seed: Tensor | int | None, dropout_p: float, batch: int, heads: int, queries: int, keys: int
) -> Tensor:
    """The pairs that dropout keeps, bool ``[batch, heads, queries, keys]``.

    Pair ``(b, h, i, j)`` is word ``j % 4`` of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", 2011) with counter ``(j // 4, i, h, b)`` and the seed as key; it is dropped where the word is less than
    ``dropout_p * 2^32``.
    """
    if seed is None:
        raise ValueError("philox_keep_mask: seed is required")
    bits = int(seed) & 0xFFFFFFFFFFFFFFFF
    key = [np.uint64(bits & 0xFFFFFFFF), np.uint64(bits >> 32)]
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    sizes = (batch, heads, queries, -(-keys // 4))
    b, h, i, j = np.meshgrid(*(np.arange(size, dtype=np.uint64) for size in sizes), indexing="ij")
    word = [j, i, h, b]
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * word[0], np.uint64(0xCD9E8D57) * word[2]
        word = [(second >> shift) ^ word[1] ^ key[0], second & low, (first >> shift) ^ word[3] ^ key[1], first & low]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    words = np.stack(word, axis=-1).reshape(batch, heads, queries, 4 * sizes[3])[..., :keys]
    return torch.from_numpy(words >= np.uint64(round(dropout_p * 2**32)))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    eligible: Tensor,
    kv_lens: Tensor | None,
    kept: Tensor | None,
    dropout_p: float,
    scale: float | None,
    score: str,
    log_prior: bool,
) -> tuple[Tensor, Tensor]:
    """Both attentions, in the dtype of weight ``[B, Hq, N, M]``; what is not eligible (same shape) takes no part."""
    if score not in ("dot", "gaussian"):
        raise ValueError(f"score must be 'dot' or 'gaussian' (got {score!r})")
    query, key, value = query.to(weight.dtype), key.to(weight.dtype), value.to(weight.dtype)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if kv_lens is not None:
        visible = torch.arange(key.shape[2], device=key.device) < kv_lens.long()[:, None]
        key, value = (torch.where(visible[:, None, :, None], x, 0) for x in (key, value))
        eligible = eligible & visible[:, None, None, :]
    repeats = query.shape[1] // max(key.shape[1], 1)
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)

    scores = scale * query @ key.transpose(-1, -2)
    if score == "gaussian":
        scores = scores - scale / 2 * key.square().sum(-1).unsqueeze(-2)

    # A NaN weight counts, and makes its row NaN.
    support = eligible & ~(weight <= (-math.inf if log_prior else 0))
    empty = ~support.any(-1, keepdim=True)
    outside = eligible & ~support & ~empty
    # Weights join the scores in the exponent: only their ratios within a row matter, however large they are.
    scores = scores + (torch.where(support, weight, 0) if log_prior else torch.where(support, weight, 1).log())
    if scores.shape[-1] == 0:
        row_max = scores.new_zeros((*scores.shape[:-1], 1))
    else:
        largest = scores.detach().masked_fill(~support | scores.isnan(), -math.inf).amax(-1, keepdim=True)
        row_max = largest.masked_fill(empty | largest.isinf(), 0)
    unnormalised = torch.where(support, scores - row_max, -math.inf).exp()
    if not log_prior:
        # Pairs of weight zero add nothing, but the derivative with respect to their weight is exp(s), not zero.
        factor = torch.where(outside, scores.detach() - row_max, -math.inf).exp()
        unnormalised = unnormalised + _ZeroWithGradient.apply(torch.where(outside, weight, 0), factor)
    total = unnormalised.sum(-1, keepdim=True)
    total = total.masked_fill(total.isinf(), math.nan)  # an infinite weight makes its row NaN
    attention = unnormalised / total.masked_fill(empty, 1)
    if kept is not None:
        attention = attention * kept.to(attention) * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    logsumexp = (row_max + total.detach().log()).masked_fill(empty, -math.inf).squeeze(-1)
    return attention @ value, logsumexp


class _ZeroWithGradient(torch.autograd.Function):
    """``0 * weight`` whose derivative with respect to the weight is ``factor``, which may be infinite."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return torch.zeros_like(weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_output: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.where(factor == 0, 0, factor * grad_output[0]), None


def _take_rows(x: Tensor, keep: Tensor) -> Tensor:
    """``x [B, H, M, C]`` at the kept rows of each head; zeros where keep is -1."""
    batch, heads, rows, columns = x.shape
    with_zeros = torch.cat([x, x.new_zeros(batch, heads, 1, columns)], 2)
    index = torch.where(keep < 0, rows, keep)[None, :, :, None].expand(batch, heads, -1, columns)
    return with_zeros.gather(2, index)
