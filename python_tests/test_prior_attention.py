"""fiak::prior_attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LARGE_PRIOR_CASES, PRIOR_CASES, cpu_isa, error
from suite import AttentionSuite
from torch import Tensor

from fiak_ext import reference

prior_attention = torch.ops.fiak.prior_attention
prior_attention_forward = torch.ops.fiak.prior_attention_forward


class TestPriorAttention(AttentionSuite):
    op = "prior_attention"
    cases = PRIOR_CASES
    large_cases = LARGE_PRIOR_CASES

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        weight_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        return prior_attention_forward(query, key, value, mask.to(weight_dtype)[None], **options)

    def weigh(self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return prior_attention_forward(query, key, value, weight[None], **options)

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_at_most_twice_the_error_of_scaled_dot_product_attention(
        self, isa: str, dtype: torch.dtype, is_causal: bool
    ) -> None:
        generator = _generator()
        query, key, value = (torch.randn(2, 4, 197, 48, generator=generator).to(dtype) for _ in range(3))
        exact, _ = reference.prior_attention(query, key, value, is_causal=is_causal)
        theirs = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        with cpu_isa(isa):
            ours = prior_attention(query, key, value, is_causal=is_causal)
        rounding = torch.finfo(dtype).eps * float(exact.abs().max())
        assert error(ours, exact) <= 2 * error(theirs, exact) + rounding

    @pytest.mark.parametrize(
        ("rows", "queries", "keys", "head_dim"),
        [(4, 1, 1024, 64), (4, 1, 1024, 32), (2, 2, 511, 64), (3, 3, 256, 128), (8, 4, 1023, 33)],
    )
    def test_decoding_rows_leave_each_other_alone(
        self, isa: str, dtype: torch.dtype, rows: int, queries: int, keys: int, head_dim: int
    ) -> None:
        generator = _generator()
        query = torch.randn(1, rows // queries, queries, head_dim, generator=generator).to(dtype)
        key, value = (torch.randn(1, 1, keys, head_dim, generator=generator).to(dtype) for _ in range(2))
        exact, _ = reference.prior_attention(query, key, value)
        theirs = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        with cpu_isa(isa):
            ours = prior_attention(query, key, value)
        rounding = 4 * torch.finfo(dtype).eps * float(value.abs().max())  # of the terms
        assert error(ours, exact) <= 2 * error(theirs, exact) + rounding

    def test_additive_bias_is_a_prior(self) -> None:
        generator = _generator()
        query, key, value = (torch.randn(2, 4, 9, 8, generator=generator) for _ in range(3))
        bias = 5 * torch.randn(1, 4, 9, 9, generator=generator)
        ours = prior_attention(query, key, value, (bias - bias.amax(-1, keepdim=True)).exp())
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, value, bias))

    # Numerics of the weight

    def test_gradient_of_a_weight_of_zero(self, isa: str, dtype: torch.dtype) -> None:
        query, key, value, prior = _inputs(dtype)
        prior[0, 0, 1, 2] = prior[0, 1, 3, 0] = 0
        prior[0, 1, 3, 1] = -1  # outside the support, too
        output, logsumexp = reference.prior_attention(query, key, value, prior)
        grad_output = torch.randn(output.shape, generator=_generator())
        score = query.double() @ key.double().mT * query.shape[-1] ** -0.5
        grad_attention = grad_output.double() @ value.double().mT
        delta = (grad_output * output).sum(-1, keepdim=True)
        expected = ((score - logsumexp[..., None]).exp() * (grad_attention - delta)).sum(0, keepdim=True)
        prior.requires_grad_()
        with cpu_isa(isa):
            (grad,) = torch.autograd.grad(prior_attention(query, key, value, prior), prior, grad_output.to(dtype))
        assert (expected[prior <= 0].abs() > 0.01).all()
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.05)
        torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=tolerance)

    def test_gradient_of_a_weight_of_zero_is_the_one_sided_derivative(self) -> None:
        query, key, value, prior = _inputs(torch.float64)
        prior[0, 0, 1, 2] = 0
        prior.requires_grad_()
        (grad,) = torch.autograd.grad(prior_attention(query, key, value, prior).sin().sum(), prior)
        moved = prior.detach().clone()
        moved[0, 0, 1, 2] = 1e-7
        change = (
            prior_attention(query, key, value, moved).sin().sum()
            - prior_attention(query, key, value, prior).sin().sum()
        )
        torch.testing.assert_close(grad[0, 0, 1, 2], change.detach() / 1e-7, rtol=1e-5, atol=1e-8)

    def test_overflowing_gradient_of_a_weight_touches_no_other(self, isa: str, dtype: torch.dtype) -> None:
        query, key, value, prior = _inputs(dtype)
        key[0, 0, 3], query[0, 0, 1] = 60.0, 60.0  # s = 60 * 60 * sqrt(D) overflows exp in every dtype
        prior[:, :, :, 3] = 0
        results = []
        for size in (60.0, 0.0):
            key[0, 0, 3] = size
            leaves = [x.clone().requires_grad_() for x in (query, key, value, prior)]
            with cpu_isa(isa):
                output = prior_attention(*leaves)
                results.append([output, *torch.autograd.grad(output[..., 0].square().sum(), leaves)])
        grad = results[0][-1]
        assert grad[0, 0, 1, 3].isinf()
        assert all(x.isfinite().all() for x in results[0][:-1])
        assert all(torch.equal(x, y) for x, y in zip(results[0][:-1], results[1][:-1], strict=True))
        others = torch.ones(grad.shape[-1], dtype=torch.bool).index_fill(0, torch.tensor(3), False)
        assert torch.equal(grad[..., others], results[1][-1][..., others])
        rows = torch.arange(grad.shape[2]) != 1
        assert grad[:, :, rows].isfinite().all()

    def test_hidden_pairs_and_empty_rows_have_no_weight_gradient(self, isa: str, dtype: torch.dtype) -> None:
        query, key, value, prior = _inputs(dtype)
        prior[0, 0, 4] = 0
        prior.requires_grad_()
        kv_lens = torch.full((query.shape[0],), 4)
        with cpu_isa(isa):
            output = prior_attention(query, key, value, prior, is_causal=True, kv_lens=kv_lens)
            (grad,) = torch.autograd.grad(output[..., 0].square().sum(), prior)
        assert (grad[0, 0, 4] == 0).all()
        assert (grad[..., 4:] == 0).all()
        assert (grad.triu(1) == 0).all()
        assert (grad[0, 1, 4, :4] != 0).all()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
    def test_bad_weight_makes_its_row_nan(self, isa: str, dtype: torch.dtype, bad: float) -> None:
        query, key, value, prior = _inputs(dtype)
        with cpu_isa(isa):
            clean = prior_attention_forward(query, key, value, prior)
            prior[0, 1, 2, 3] = bad
            results = prior_attention_forward(query, key, value, prior)
        rows = torch.zeros(results[1].shape, dtype=torch.bool)
        rows[:, 1, 2] = True
        for result, before in zip(results, clean, strict=True):
            assert result[rows].isnan().all()
            assert torch.equal(result[~rows], before[~rows])

    def test_uniform_prior_is_softmax_attention(self, isa: str, dtype: torch.dtype) -> None:
        query, key, value, prior = _inputs(dtype)
        with cpu_isa(isa):
            plain, plain_lse = prior_attention_forward(query, key, value)
            for shape in ((1, 1, 1), (1, 2, 1), (1, 1, 5), (2, 2, 5)):
                ones = torch.ones(*shape, prior.shape[-1], dtype=prior.dtype)
                output, logsumexp = prior_attention_forward(query, key, value, ones)
                torch.testing.assert_close(output, plain)
                torch.testing.assert_close(logsumexp, plain_lse)

    def test_expanded_prior_is_a_broadcast_one(self, isa: str, dtype: torch.dtype) -> None:
        query, key, value, prior = _inputs(dtype)
        row = prior[:, :1, :1].contiguous()
        with cpu_isa(isa):
            for layout in (
                row.expand(2, 2, 5, -1),
                row.expand(2, 2, 5, -1).contiguous(),
                row.expand(2, 2, 5, -1).mT.contiguous().mT,
            ):
                leaf = layout.detach().requires_grad_()
                output = prior_attention(query, key, value, leaf)
                assert torch.equal(output, prior_attention(query, key, value, row))
                (grad,) = torch.autograd.grad(output[..., 0].square().sum(), leaf)
                assert grad.shape == (2, 2, 5, prior.shape[-1])

    def test_broadcast_gradient_is_the_sum_of_the_full_one(self, isa: str, dtype: torch.dtype) -> None:
        query, key, value, prior = _inputs(dtype)
        with cpu_isa(isa):
            grads = []
            for shape in ((2, 2, 5), (1, 1, 1)):
                leaf = prior[:1, :1, :1].expand(*shape, -1).contiguous().requires_grad_()
                output = prior_attention(query, key, value, leaf)
                grads.append(torch.autograd.grad(output[..., 0].square().sum(), leaf)[0])
        torch.testing.assert_close(grads[0].double().sum((0, 1, 2), keepdim=True).to(grads[1].dtype), grads[1])

    @pytest.mark.parametrize(
        ("prior", "message"),
        [
            (torch.ones(2, 4, 5), r"prior must have the shape \[G, 1\|Hq, 1\|N, M\] \(got \[2, 4, 5\]\)"),
            (torch.ones(3, 2, 4, 5), r"prior must have a number of groups G that divides B = 2 \(got 3\)"),
            (torch.ones(0, 2, 4, 5), r"prior must have G >= 1 groups \(got 0\)"),
            (
                torch.ones(1, 3, 4, 5),
                r"prior must have size 1 or 2 in dimension 1, query's heads \(got \[1, 3, 4, 5\]\)",
            ),
            (
                torch.ones(1, 2, 3, 5),
                r"prior must have size 1 or 4 in dimension 2, query's rows \(got \[1, 2, 3, 5\]\)",
            ),
            (torch.ones(1, 2, 4, 1), r"prior must have size 5 in dimension 3, key's rows \(got \[1, 2, 4, 1\]\)"),
            (
                torch.ones(1, 2, 4, 5).double(),
                r"prior must be torch.float32 with torch.float32 inputs \(got torch.float64\)",
            ),
            (
                torch.ones(1, 2, 4, 5).half(),
                r"prior must be torch.float32 with torch.float32 inputs \(got torch.float16\)",
            ),
            (torch.ones(1, 2, 4, 5, device="meta"), r"prior must be on the device of query|query must be on"),
        ],
        ids=lambda value: str(tuple(value.shape)) if isinstance(value, Tensor) else "",
    )
    def test_malformed_prior(self, prior: Tensor, message: str) -> None:
        self.refuse({"prior": prior}, message)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key and value of 2 elements, 2 heads, 5 queries and 7 keys, and a positive prior [1, 2, 5, 7]."""
    generator = _generator()
    query, key, value = (torch.randn(2, 2, rows, 6, generator=generator).to(dtype) for rows in (5, 7, 7))
    prior = torch.rand(1, 2, 5, 7, generator=generator) + 0.1
    return query, key, value, prior.double() if dtype == torch.float64 else prior
