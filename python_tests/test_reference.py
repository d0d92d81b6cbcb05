"""fiak_ext.reference against torch's own operations and finite differences."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CSR_CASES, PRIOR_CASES, Case, csr_of
from torch import Tensor

from fiak_ext import reference

SIZES = {"query": (2, 4, 5, 6), "key": (2, 2, 7, 6), "value": (2, 2, 7, 3)}


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(size, generator=generator, dtype=torch.float64) for size in SIZES.values())
    return query, key, value


@pytest.fixture
def weight() -> Tensor:
    return torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1


def test_softmax_attention(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    for options in ({}, {"is_causal": True}, {"scale": 0.0}, {"scale": -2.0}):
        output, _ = reference.prior_attention(*qkv, **options)
        torch.testing.assert_close(output, F.scaled_dot_product_attention(*qkv, enable_gqa=True, **options))


def test_prior_is_an_additive_bias(qkv: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> None:
    output, logsumexp = reference.prior_attention(*qkv, weight)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(*qkv, weight.log(), enable_gqa=True))
    score = qkv[0] @ qkv[1].repeat_interleave(2, 1).mT / 6**0.5
    torch.testing.assert_close(logsumexp, (score + weight.log()).logsumexp(-1))


def test_zero_weights_are_a_mask(qkv: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> None:
    mask = weight > 0.5
    mask[0, 0, 2] = False
    output, logsumexp = reference.prior_attention(*qkv, mask.double())
    expected = F.scaled_dot_product_attention(*qkv, mask, enable_gqa=True).masked_fill(~mask.any(-1)[..., None], 0)
    torch.testing.assert_close(output, expected)
    assert (output[0, 0, 2] == 0).all()
    assert logsumexp[0, 0, 2] == -torch.inf


def test_gaussian_score_is_a_squared_distance(qkv: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> None:
    query, key, value = qkv
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    kernel = weight * (-0.3 / 2 * torch.cdist(query, key).square()).exp()
    output, logsumexp = reference.prior_attention(*qkv, weight, score="gaussian", scale=0.3)
    torch.testing.assert_close(output, kernel @ value / kernel.sum(-1, keepdim=True))
    torch.testing.assert_close(logsumexp, kernel.sum(-1).log() + 0.15 * query.square().sum(-1))


def test_kv_lens_hide_the_end(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = qkv
    key[0, :, 3:] = torch.nan
    value[0, :, 3:] = torch.nan
    output, _ = reference.prior_attention(query, key, value, kv_lens=torch.tensor([3, 7]))
    expected, _ = reference.prior_attention(query[:1], key[:1, :, :3], value[:1, :, :3])
    torch.testing.assert_close(output[:1], expected)
    assert output.isfinite().all()


def test_groups_and_broadcasting(qkv: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> None:
    for prior in (weight, weight[:, :1], weight[:, :, :1], weight[:1, :1, :1]):
        output, _ = reference.prior_attention(*qkv, prior)
        for b in range(2):
            query, key, value = (x[b : b + 1] for x in qkv)
            alone, _ = reference.prior_attention(query, key, value, prior[b % len(prior)][None])
            torch.testing.assert_close(output[b : b + 1], alone)


def test_csr_is_the_masked_prior(qkv: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> None:
    mask = weight > 0.5
    sparse, sparse_lse = reference.csr_attention(*qkv, *csr_of(mask), weight[mask])
    dense, dense_lse = reference.prior_attention(*qkv, weight * mask)
    torch.testing.assert_close(sparse, dense)
    torch.testing.assert_close(sparse_lse, dense_lse)


def test_query_offsets_choose_rows(qkv: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> None:
    query, key, value = qkv
    crow, col = csr_of(weight[:1] > 0.4)
    options: dict[str, Any] = {"dropout_p": 0.3, "seed": 3}
    full, _ = reference.csr_attention(query, key, value, crow, col, **options)
    offsets = torch.tensor([2, 0])
    part = torch.stack([query[0, :, 2:4], query[1, :, 0:2]])
    actual, _ = reference.csr_attention(part, key, value, crow, col, query_offsets=offsets, num_queries=5, **options)
    torch.testing.assert_close(actual, torch.stack([full[0, :, 2:4], full[1, :, 0:2]]))


@pytest.mark.parametrize("case", [*PRIOR_CASES, *CSR_CASES], ids=lambda case: f"{case.op}:{case}")
def test_gradcheck(case: Case) -> None:
    problem = case.problem()
    leaves = [x.clone() for x in problem.tensors if x is not None]
    leaves[3:] = [x.clamp_min(0.1) for x in leaves[3:]]  # inside the support
    assert torch.autograd.gradcheck(lambda *x: problem.reference(*x)[0], [x.requires_grad_() for x in leaves])


def test_gradient_of_a_weight_of_zero_is_the_one_sided_derivative(
    qkv: tuple[Tensor, Tensor, Tensor], weight: Tensor
) -> None:
    places = [(0, 0, 1, 2), (1, 3, 4, 0)]
    for place in places:
        weight[place] = 0
    weight[0, 1, 3] = 0  # an empty row
    leaf = weight.clone().requires_grad_()
    before = reference.prior_attention(*qkv, leaf)[0].sin().sum()
    (grad,) = torch.autograd.grad(before, leaf)
    for place in places:
        moved = weight.clone()
        moved[place] = 1e-6
        change = reference.prior_attention(*qkv, moved)[0].sin().sum() - before
        torch.testing.assert_close(grad[place], change.detach() / 1e-6, rtol=1e-5, atol=1e-8)
    assert (grad[0, 1, 3] == 0).all()


def test_scores_outside_the_support_do_not_matter(qkv: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> None:
    query, key, value = qkv
    weight[..., 3] = 0
    key[:, :, 3] = 1e4
    leaves = [x.requires_grad_() for x in (query, key, value, weight)]
    output, _ = reference.prior_attention(query, key, value, weight)
    *grads, weight_grad = torch.autograd.grad(output[..., 0].sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert weight_grad[..., 3].isinf().any()
    others = [0, 1, 2, 4, 5, 6]
    fewer, _ = reference.prior_attention(query, key[:, :, others], value[:, :, others], weight[..., others])
    torch.testing.assert_close(output, fewer)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_bad_weight_makes_its_row_nan(qkv: tuple[Tensor, Tensor, Tensor], weight: Tensor, bad: float) -> None:
    clean = reference.prior_attention(*qkv, weight)
    weight[0, 1, 2, 3] = bad
    for result, before in zip(reference.prior_attention(*qkv, weight), clean, strict=True):
        assert result[0, 1, 2].isnan().all()
        before[0, 1, 2] = result[0, 1, 2] = 0
        assert torch.equal(result, before)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_results_are_float64(low: torch.dtype, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = (x.to(low) for x in qkv)
    output, logsumexp = reference.prior_attention(query, key, value)
    assert output.dtype == logsumexp.dtype == torch.float64
    torch.testing.assert_close(output, reference.prior_attention(*(x.double() for x in (query, key, value)))[0])
    assert reference.prior_attention(query, key, value, dtype=low)[0].dtype == low


def test_philox_known_answers() -> None:
    """Of Random123's kat_vectors, for 10 rounds with counter and key 0."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for j, word in enumerate(words):
        # The pair is kept up to the probability that its word stands for, and dropped from the next one on.
        kept = [reference.philox_keep_mask(0, (word + more) / 2**32, 1, 1, 1, 4)[0, 0, 0, j] for more in (0, 1)]
        assert kept == [True, False]


def test_philox_mask_depends_on_each_coordinate() -> None:
    mask = reference.philox_keep_mask(2**62 + 5, 0.25, 4, 3, 40, 50)
    assert abs(mask.double().mean() - 0.75) < 0.01
    assert torch.equal(mask[:2, :2, :7, :9], reference.philox_keep_mask(2**62 + 5, 0.25, 2, 2, 7, 9))
    for dim in range(4):
        assert all(not torch.equal(x, y) for x, y in pairwise(mask.unbind(dim)))
    for seed in (5, 2**62 + 6, -5):
        assert not torch.equal(mask, reference.philox_keep_mask(seed, 0.25, 4, 3, 40, 50))
    assert not reference.philox_keep_mask(1, 1.0, 1, 1, 5, 5).any()
    with pytest.raises(ValueError, match="seed is required"):
        reference.philox_keep_mask(None, 0.5, 1, 1, 1, 1)


def test_dropout_follows_the_normalisation(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = qkv
    attention = (query @ key.repeat_interleave(2, 1).mT / 6**0.5).softmax(-1)
    kept = reference.philox_keep_mask(9, 0.4, 2, 4, 5, 7)
    output, _ = reference.prior_attention(*qkv, dropout_p=0.4, seed=9)
    torch.testing.assert_close(output, (attention * kept / 0.6) @ value.repeat_interleave(2, 1))


def test_unknown_score(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="score must be 'dot' or 'gaussian'"):
        reference.prior_attention(*qkv, score="cosine")


def test_compaction(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    _, key, value = qkv
    keep = torch.tensor([[1, 4, 6], [0, -1, -1]])
    kept_key, kept_value = reference.compact_kv(key, value, keep)
    for kept, full in ((kept_key, key), (kept_value, value)):
        assert torch.equal(kept[:, 0], full[:, 0, [1, 4, 6]])
        assert torch.equal(kept[:, 1, 0], full[:, 1, 0])
        assert (kept[:, 1, 1:] == 0).all()
    linear = torch.nn.Linear(5, 2 * 6, dtype=torch.float64)
    tokens = torch.randn(2, 7, 5, dtype=torch.float64)
    projected = linear(tokens).unflatten(2, (2, 6)).transpose(1, 2)
    actual = reference.compact_linear(tokens, linear.weight, linear.bias, keep)
    torch.testing.assert_close(actual, reference.compact_kv(projected, projected, keep)[0])
    bare = reference.compact_linear(tokens, linear.weight, None, keep)
    torch.testing.assert_close((actual - bare)[:, 0], linear.bias[:6].expand(2, 3, 6))
