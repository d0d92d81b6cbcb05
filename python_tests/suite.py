"""What prior_attention and csr_attention have to pass alike: their common contracts, each a test of one class."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from cases import (
    DTYPES,
    KERNELS,
    Case,
    Problem,
    assert_close_enough,
    cpu_isa,
    error,
    isas_of,
    num_threads,
    random_case,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fiak_ext import reference

SWEEP = range(60)


class AttentionSuite:
    """Subclasses name the op and its cases, and call it with a boolean pattern instead of weights."""

    op: ClassVar[str]
    cases: ClassVar[list[Case]]
    large_cases: ClassVar[list[Case]]
    kernels: ClassVar[tuple[str, ...]] = ("auto",)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """The op's forward over the pairs of a mask ``[Hq, N, M]``: weights 1, the others pruned."""
        raise NotImplementedError

    def weigh(self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """The op's forward over all pairs, of weights ``[Hq, N, M]``, float32 (float64 with float64 inputs)."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=str)
        if "large_case" in metafunc.fixturenames:
            metafunc.parametrize("large_case", self.large_cases, ids=str)
        if {"isa", "dtype"} <= set(metafunc.fixturenames):
            metafunc.parametrize(("isa", "dtype"), KERNELS, ids=[f"{isa}-{str(dtype)[6:]}" for isa, dtype in KERNELS])
        elif "isa" in metafunc.fixturenames:
            metafunc.parametrize("isa", isas_of(torch.bfloat16))
        elif "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

    # Against the reference

    @pytest.mark.parametrize("seed", SWEEP)
    def test_random_sizes(self, seed: int) -> None:
        self._compare(random_case(self.op, seed), seed)

    def test_large_sizes(self, large_case: Case) -> None:
        self._compare(large_case, 0)

    def _compare(self, case: Case, seed: int) -> None:
        for dtype in DTYPES:
            problem = case.problem(dtype, seed)
            for isa in isas_of(dtype):
                with cpu_isa(isa):
                    assert_close_enough(problem)

    def test_gradcheck(self, case: Case) -> None:
        problem = case.problem()
        weight = problem.tensors[3]
        leaves = [
            x.clone().requires_grad_() for x in problem.tensors[:3] if x is not None
        ]  # whose memory overlaps nowhere
        if weight is None:
            assert torch.autograd.gradcheck(problem.public, leaves)
            return
        # Central differences are halved at the edge of the support, so pairs of weight 0 keep it here.
        outside = weight == (-torch.inf if case.log_prior else 0)
        inside = weight.masked_fill(outside, 0.5).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda q, k, v, w: problem.public(q, k, v, torch.where(outside, weight, w)), [*leaves, inside]
        )

    def test_every_requires_grad_subset(self, case: Case) -> None:
        problem = case.problem(torch.float32)
        full = problem.run()
        for wanted in itertools.product([True, False], repeat=4):
            for name, tensor in problem.run(wanted=wanted).items():
                assert torch.equal(tensor, getattr(full, name)), (wanted, name)

    # Contracts with torch

    def test_opcheck(self, case: Case) -> None:
        problem = case.problem(torch.float32)
        arguments = problem.arguments(*problem.leaves())
        torch.library.opcheck(getattr(torch.ops.fiak, self.op).default, arguments, problem.options)
        torch.library.opcheck(getattr(torch.ops.fiak, self.op + "_forward").default, arguments, problem.options)
        with torch.no_grad():
            output, logsumexp = problem.forward()
        backward = getattr(torch.ops.fiak, self.op + "_backward").default
        for mask in ([True] * 4, [False, True, False, False]):
            tensors = (torch.randn_like(output), *problem.arguments(), output, logsumexp)
            torch.library.opcheck(backward, tensors, {**problem.options, "output_mask": mask})

    def test_dispatcher_sees_forward_and_backward(self, case: Case) -> None:
        """And backward computes only what is wanted."""
        problem = case.problem()
        has_weight = problem.tensors[3] is not None
        for wanted in itertools.product([True, False], repeat=4):
            if not any(wanted[: 3 + has_weight]):
                continue
            with _Recorder() as recorder:
                problem.public(*problem.leaves(wanted)).sum().backward()
            forward, backward = recorder.calls
            assert forward[0] == f"fiak::{self.op}_forward"
            assert backward[0] == f"fiak::{self.op}_backward"
            assert backward[1]["output_mask"] == [*wanted[:3], wanted[3] and has_weight]

    def test_output_lies_in_token_order(self, case: Case) -> None:
        problem = case.problem()
        assert problem.public().transpose(1, 2).is_contiguous()
        assert torch.equal(problem.public(), problem.forward()[0])

    def test_logsumexp_is_not_differentiable(self) -> None:
        problem = self.cases[0].problem()
        output, logsumexp = problem.forward(*problem.leaves())
        assert output.requires_grad
        assert not logsumexp.requires_grad

    def test_double_backward_is_refused_by_name(self) -> None:
        problem = self.cases[0].problem()
        query = problem.tensors[0].clone().requires_grad_()
        (grad,) = torch.autograd.grad(problem.public(query).square().sum(), query, create_graph=True)
        with pytest.raises(RuntimeError, match=f"fiak::{self.op}_backward is not implemented"):
            grad.sum().backward()

    def test_inference_mode(self, case: Case) -> None:
        problem = case.problem()
        with torch.inference_mode():
            output = problem.public()
        assert torch.equal(output, problem.public())

    @pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_casts_query_key_and_value(self, case: Case, low: torch.dtype) -> None:
        problem = case.problem(torch.float32)
        leaves = problem.leaves()
        with torch.autocast("cpu", low):
            output = problem.public(*leaves)
        assert torch.equal(output, problem.public(*(x.to(low) for x in problem.tensors[:3] if x is not None)))
        output.sum().backward()
        assert all(leaf.grad is not None and leaf.grad.dtype == leaf.dtype for leaf in leaves if leaf is not None)

    def test_autocast_leaves_float64_alone(self) -> None:
        problem = self.cases[0].problem()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(problem.public(), problem.public(*problem.tensors))

    def test_arguments_are_not_modified(self, case: Case) -> None:
        problem = case.problem(torch.float32)
        tensors = [x for x in (*problem.arguments(), *problem.options.values()) if isinstance(x, Tensor)]
        before = [x.clone() for x in tensors]
        problem.run()
        assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))

    # Numerics

    def test_threads_do_not_change_a_bit(self, isa: str, dtype: torch.dtype) -> None:
        for case in [*self.cases, *self.large_cases[:2]]:
            problem = case.problem(dtype)
            with cpu_isa(isa):
                with num_threads(1):
                    single = problem.run()
                for threads in (2, 3):
                    with num_threads(threads):
                        for name, tensor in problem.run().items():
                            assert _same_bits(tensor, getattr(single, name)), (case, threads, name)

    def test_huge_score_of_a_pruned_pair_changes_nothing(self, isa: str, dtype: torch.dtype) -> None:
        query, key, value, mask = _qkv(dtype)
        mask[:, :, 3] = False
        results = []
        for size in (1.0, 3e4):
            leaves = [query.clone(), key.clone(), value.clone()]
            leaves[1][:, :, 3] = size * query.sign()[:, :, 0]
            with cpu_isa(isa):
                query_leaf, key_leaf, value_leaf = (x.requires_grad_() for x in leaves)
                output, logsumexp = self.attend(query_leaf, key_leaf, value_leaf, mask, scale=1.0)
                grads = torch.autograd.grad(output, leaves, torch.ones_like(output))
            results.append([output, logsumexp, *grads])
        assert all(_same_bits(x, y) for x, y in zip(*results, strict=True))
        assert all(x.isfinite().all() for x in results[0])

    def test_empty_rows(self, isa: str, dtype: torch.dtype) -> None:
        query, key, value, mask = _qkv(dtype)
        mask[0, 2] = False
        leaves = [x.requires_grad_() for x in (query, key, value)]
        with cpu_isa(isa):
            output, logsumexp = self.attend(query, key, value, mask)
            grads = torch.autograd.grad(output[:, 0, 2].sum(), leaves, retain_graph=True)
        assert (output[:, 0, 2] == 0).all()
        assert (logsumexp[:, 0, 2] == -torch.inf).all()
        assert logsumexp.isfinite().sum() == logsumexp.numel() - query.shape[0]
        assert all((grad == 0).all() for grad in grads)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
    def test_bad_query_row_stays_in_its_row(self, isa: str, dtype: torch.dtype, bad: float) -> None:
        query, key, value, mask = _qkv(dtype)
        with cpu_isa(isa):
            clean, clean_lse = self.attend(query, key, value, mask)
            query[1, 0, 2, 1] = bad
            output, logsumexp = self.attend(query, key, value, mask)
        rows = torch.zeros(logsumexp.shape, dtype=torch.bool)
        rows[1, 0, 2] = True
        assert output[rows].isnan().all()
        assert torch.equal(output[~rows], clean[~rows])
        assert torch.equal(logsumexp[~rows], clean_lse[~rows])

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
    @pytest.mark.parametrize("argument", ["key", "value"])
    def test_bad_key_or_value_row_stays_in_its_head(
        self, isa: str, dtype: torch.dtype, argument: str, bad: float
    ) -> None:
        query, key, value, mask = _qkv(dtype)
        inputs = {"query": query, "key": key, "value": value}
        with cpu_isa(isa):
            clean, _ = self.attend(**inputs, mask=mask)
            inputs[argument][1, 0, 2, 1] = bad
            output, _ = self.attend(**inputs, mask=mask)
        assert not output[1, 0].isfinite().all()
        assert torch.equal(output[0], clean[0])
        assert torch.equal(output[1, 1], clean[1, 1])

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
    def test_bad_column_that_nobody_keeps_reaches_nobody(self, isa: str, dtype: torch.dtype, bad: float) -> None:
        query, key, value, mask = _qkv(dtype)
        mask[:, :, 5] = False
        results = []
        for content in (0.0, bad):
            key[:, :, 5], value[:, :, 5] = content, content
            leaves = [x.clone().requires_grad_() for x in (query, key, value)]
            with cpu_isa(isa):
                output, logsumexp = self.attend(leaves[0], leaves[1], leaves[2], mask)
                grads = torch.autograd.grad(output, leaves, torch.ones_like(output))
            results.append([output, logsumexp, *grads])
        for x, y in zip(*results, strict=True):
            assert y.isfinite().all()
            torch.testing.assert_close(x, y)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
    def test_keys_behind_kv_lens_are_never_read(self, isa: str, dtype: torch.dtype, bad: float) -> None:
        query, key, value, mask = _qkv(dtype)
        results = []
        for content in (0.0, bad):
            key[0, :, 5:], value[0, :, 5:], key[1, :, 1:], value[1, :, 1:] = (content,) * 4
            leaves = [x.clone().requires_grad_() for x in (query, key, value)]
            with cpu_isa(isa):
                output, logsumexp = self.attend(leaves[0], leaves[1], leaves[2], mask, kv_lens=torch.tensor([5, 1]))
                grads = torch.autograd.grad(output, leaves, torch.ones_like(output))
            results.append([output, logsumexp, *grads])
        assert all(_same_bits(x, y) for x, y in zip(*results, strict=True))
        assert all(grad.isfinite().all() for grad in results[1][2:])
        assert (results[1][3][1, :, 1:] == 0).all()

    # Weights are relative, and of any size

    def _compare_weighted(
        self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, tolerance: float = 0.0, **options: Any
    ) -> None:
        """Output, logsumexp and the gradients of query, key, value and weight against float64; all but the last alone
        where weights are given as such, since that gradient is over the weight."""
        dtype = query.dtype
        leaves = [x.clone().requires_grad_() for x in (query, key, value, weight)]
        output, logsumexp = self.weigh(*leaves, **options)
        exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
        *exact_inputs, exact_weight = exact_leaves
        call: Any = reference.prior_attention
        exact, exact_logsumexp = call(*exact_inputs, exact_weight[None], **options)
        grad_output = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        grads = torch.autograd.grad(output, leaves, grad_output.to(dtype))
        exact_grads = torch.autograd.grad(exact, exact_leaves, grad_output)
        tolerance = max(tolerance, {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2}.get(dtype, 6e-2))
        pairs = [(output, exact), (logsumexp, exact_logsumexp), *zip(grads[:3], exact_grads[:3], strict=True)]
        if options.get("log_prior"):
            pairs.append((grads[3], exact_grads[3]))
        for ours, wanted in pairs:
            assert ours.isfinite().all() or not wanted.isfinite().all()
            torch.testing.assert_close(ours.double(), wanted, rtol=tolerance, atol=tolerance)
        assert not grads[3].isnan().any()

    @pytest.mark.parametrize("queries", [3, 19])  # decoded, and packed
    @pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-20, 1e35, 1e37, 3e38])
    def test_weights_are_relative(self, isa: str, dtype: torch.dtype, size: float, queries: int) -> None:
        generator = torch.Generator().manual_seed(4)
        query = torch.randn(2, 2, queries, 8, generator=generator).to(dtype)
        key, value = (torch.randn(2, 2, 33, 8, generator=generator).to(dtype) for _ in range(2))
        weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        same = torch.full((2, queries, 33), size, dtype=weight_dtype)
        with cpu_isa(isa):
            self._compare_weighted(query, key, value, same)
            ones, _ = self.weigh(query, key, value, torch.ones_like(same))
            torch.testing.assert_close(self.weigh(query, key, value, same)[0], ones)
            mixed = same * torch.rand(same.shape, generator=generator).mul(0.9).add(0.1)
            mixed[:, 0, :7] = 1e-30
            mixed[:, 1, 7:] = 0
            self._compare_weighted(query, key, value, mixed)

    @pytest.mark.parametrize("queries", [3, 19])
    def test_weights_outweigh_scores(self, isa: str, dtype: torch.dtype, queries: int) -> None:
        """Scores 90 and 60 below the others, and above them, with weights that make up for it."""
        query = torch.ones(1, 1, queries, 1, dtype=dtype)
        key = torch.zeros(1, 1, 40, 1, dtype=dtype)
        key[..., 3, :], key[..., 20, :], key[..., 30, :] = -90, 60, -60
        value = torch.randn(1, 1, 40, 5, generator=torch.Generator().manual_seed(5)).to(dtype)
        weight = torch.ones(1, queries, 40, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        weight[..., 3], weight[..., 20], weight[..., 30] = 1e38, 1e-26, 1e25
        with cpu_isa(isa):
            self._compare_weighted(query, key, value, weight, scale=1.0, tolerance=5e-5)
            self._compare_weighted(query, key, value, weight.log(), scale=1.0, tolerance=5e-5, log_prior=True)

    @pytest.mark.parametrize("size", [40.0, 61.7, 90.0])
    @pytest.mark.parametrize("weights", ["none", "weights", "logarithms"])
    def test_gradients_at_scores_of_tens_of_thousands(
        self, isa: str, dtype: torch.dtype, size: float, weights: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Keys come in pairs with the same score, so that no probability is 1; a logsumexp is rounded by 0.004."""
        generator = torch.Generator().manual_seed(0)
        key, value, grad = (torch.randn(2, 4, 64, 32, generator=generator).to(dtype) for _ in range(3))
        key = (key * size).repeat_interleave(2, dim=2)[:, :, :64].contiguous()
        mask = torch.rand(4, 64, 64, generator=generator) < 0.5
        mask[..., 1:].logical_or_(torch.eye(64, dtype=torch.bool)[..., 1:])
        mask[..., 0] = True
        weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        weight = mask.to(weight_dtype)
        if weights != "none":
            weight *= torch.rand(weight.shape, generator=generator, dtype=weight_dtype) + 0.5
        given = weight.log() if weights == "logarithms" else weight

        def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if weights == "none":
                return self.attend(query, key, value, mask)[0]
            return self.weigh(query, key, value, given, log_prior=weights == "logarithms")[0]

        def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            scores = query @ key.mT / 32**0.5 + weight.to(query.dtype).log()
            return scores.softmax(-1) @ value

        def grads(call: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in (key, key, value)]
            return list(torch.autograd.grad(call(*leaves), leaves, grad.to(dtype)))

        exact = grads(eager, torch.float64)
        theirs = grads(eager, weight_dtype)
        for kernel in self.kernels:
            monkeypatch.setenv("FIAK_CSR_KERNEL", kernel)
            with cpu_isa(isa):
                actual = grads(ours, dtype)
            # A query's gradient is what is left of pairs of keys that cancel each other.
            for name, mine, other, wanted in zip(("key", "value"), actual[1:], theirs[1:], exact[1:], strict=True):
                rounding = 8 * max(torch.finfo(dtype).eps, 1e-11) * float(wanted.abs().max())
                # A score plus a logarithm is rounded in units of powers of two, where numbers are larger.
                times = 4 if weights == "logarithms" else 2
                assert error(mine, wanted) <= times * error(other, wanted) + rounding, (kernel, name)

    @pytest.mark.parametrize("queries", [3, 19])
    @pytest.mark.parametrize("hidden", [95.0, 104.0, 1e4, 1e30])
    def test_hidden_weights_may_be_of_any_size(self, isa: str, dtype: torch.dtype, hidden: float, queries: int) -> None:
        generator = torch.Generator().manual_seed(6)
        query = torch.randn(2, 2, queries, 8, generator=generator).to(dtype)
        key, value = (torch.randn(2, 2, 40, 8, generator=generator).to(dtype) for _ in range(2))
        weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        weight = torch.randn(2, queries, 40, generator=generator).to(weight_dtype)
        weight[:, :, 25:] = hidden
        weight[:, 2, :4] = -torch.inf
        kv_lens = torch.tensor([25, 10])
        with cpu_isa(isa):
            self._compare_weighted(query, key, value, weight, kv_lens=kv_lens, log_prior=True)
            self._compare_weighted(query, key, value, weight.exp().clamp(max=1e38), kv_lens=kv_lens)

    @pytest.mark.parametrize("queries", [3, 19])
    def test_log_prior(self, isa: str, dtype: torch.dtype, queries: int) -> None:
        """Any finite number is a weight, -inf is none, NaN and inf make their row NaN."""
        generator = torch.Generator().manual_seed(7)
        query = torch.randn(2, 2, queries, 8, generator=generator).to(dtype)
        key, value = (torch.randn(2, 2, 40, 8, generator=generator).to(dtype) for _ in range(2))
        weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        weight = torch.zeros(2, queries, 40, dtype=weight_dtype)
        least = torch.finfo(torch.float32).min
        with cpu_isa(isa):
            plain, plain_lse = self.weigh(query, key, value, torch.ones_like(weight))
            for row, size in enumerate([0.0, 300.0, least]):  # of whole rows
                weight[:, row] = size
            output, logsumexp = self.weigh(query, key, value, weight, log_prior=True)
            torch.testing.assert_close(output, plain)
            shifted = (logsumexp - weight[None, ..., 0])[..., :2]
            torch.testing.assert_close(shifted, plain_lse[..., :2], rtol=0, atol=1e-4)
            assert logsumexp.isfinite().all()
            weight[0, 0], weight[1, 0, 3], weight[0, 1, 5] = -torch.inf, torch.nan, torch.inf
            weight[1, 1, 1:], weight[0, 2, 4] = least, torch.inf
            leaves = [x.clone().requires_grad_() for x in (query, key, value, weight)]
            output, logsumexp = self.weigh(*leaves, log_prior=True)
            rows = torch.zeros(logsumexp.shape, dtype=torch.bool)
            rows[:, 1, 0] = rows[:, 0, 1] = rows[:, 0, 2] = True
            assert output[rows].isnan().all() and logsumexp[rows].isnan().all()
            assert (output[:, 0, 0] == 0).all() and (logsumexp[:, 0, 0] == -torch.inf).all()
            torch.testing.assert_close(output[:, 1, 1], value[:, 1, 0])
            kept = rows.logical_not()
            assert output[kept].isfinite().all()
            (grad,) = torch.autograd.grad(output[:, 1, 1:].sum(), leaves[3])
            assert grad[1, 1:].isfinite().all()

    def test_low_precision_is_accumulated_in_float32(self, isa: str) -> None:
        keys = 4096  # in bfloat16, 256 + 1 is 256
        for dtype in (torch.bfloat16, torch.float16):
            query, key = torch.zeros(1, 1, 1, 8, dtype=dtype), torch.zeros(1, 1, keys, 8, dtype=dtype)
            value = torch.ones(1, 1, keys, 8, dtype=dtype)
            with cpu_isa(isa):
                output, logsumexp = self.attend(query, key, value, torch.ones(1, 1, keys, dtype=torch.bool))
            assert (output == 1).all()
            torch.testing.assert_close(logsumexp.exp(), torch.full((1, 1, 1), float(keys)), rtol=1e-5, atol=0)

    def test_scores_far_apart_do_not_overflow(self, isa: str, dtype: torch.dtype) -> None:
        query, key, value, mask = _qkv(dtype)
        with cpu_isa(isa):
            for scale in (100.0, -100.0):
                output, logsumexp = self.attend(query, key, value, mask, scale=scale)
                assert output.isfinite().all()
                assert logsumexp.isfinite().all()

    @pytest.mark.parametrize("queries", [2, 33])  # decoded, and packed
    def test_scores_that_span_ten_thousand(self, isa: str, dtype: torch.dtype, queries: int) -> None:
        # A weight of 0 where the score is the largest by far has a gradient like e^1000.
        kept = 1.0 if self.op == "prior_attention" else 0.6
        case = Case(
            self.op,
            batch=5,
            key_heads=1,
            queries=queries,
            keys=400,
            head_dim=16,
            value_dim=16,
            scale=900.0,
            kept=kept,
        )
        problem = case.problem(dtype)
        query, key = (x.detach().double() for x in problem.tensors[:2] if x is not None)
        scores = 900 * query @ key.mT
        assert (scores.amax(-1) - scores.amin(-1)).median() > 1e4
        with cpu_isa(isa):
            assert_close_enough(problem)

    def test_strides_beyond_31_bits(self, isa: str) -> None:
        base = torch.empty(2**31 + 1000, dtype=torch.float16)  # touched at both ends only
        query = base.as_strided((2, 2, 4, 8), (2**31, 32, 8, 1))
        small = torch.randn(query.shape, dtype=torch.float64).to(query.dtype)
        query.copy_(small)
        mask = torch.rand(2, 4, 4) < 0.7
        with cpu_isa(isa):
            actual, expected = self.attend(query, query, query, mask), self.attend(small, small, small, mask)
        assert torch.equal(actual[0], expected[0])

    def test_empty_tensors(self, isa: str, dtype: torch.dtype) -> None:
        for empty in ({"batch": 0}, {"query_heads": 0, "key_heads": 0}, {"queries": 0}, {"keys": 0}):
            for case in self.cases:
                changed = {**vars(case), **empty}
                problem = Case(**changed).problem(dtype)
                with cpu_isa(isa):
                    results = problem.run()
                assert (results.output == 0).all()
                assert (results.logsumexp == -torch.inf).all()
                assert all((grad == 0).all() for _, grad in list(results.items())[2:])

    # Errors

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"query": torch.zeros(2, 2, 4)}, r"query must have the shape \[B, Hq, N, D\] \(got \[2, 2, 4\]\)"),
            ({"key": torch.zeros(2, 2, 5)}, r"key must have the shape \[B, H, M, D\] \(got \[2, 2, 5\]\)"),
            ({"value": torch.zeros(())}, r"value must have the shape \[B, H, M, Dv\] \(got \[\]\)"),
            (
                {"query": torch.zeros(2, 2, 4, 3, dtype=torch.int32)},
                r"query must be .*torch.float16 \(got torch.int32\)",
            ),
            ({"key": torch.zeros(2, 2, 5, 3).half()}, r"key must have the dtype of query.*\(got torch.float16\)"),
            ({"value": torch.zeros(2, 2, 5, 2).double()}, r"value must have the dtype of query.*\(got torch.float64\)"),
            ({"key": torch.zeros(2, 2, 5, 3, device="meta")}, r"key must be on the device of query|query must be on"),
            ({"query": torch.zeros(2, 2, 4, 0), "key": torch.zeros(2, 2, 5, 0)}, r"query must have D >= 1"),
            ({"value": torch.zeros(2, 2, 5, 0)}, r"value must have Dv >= 1 \(got \[2, 2, 5, 0\]\)"),
            ({"key": torch.zeros(1, 2, 5, 3)}, r"key must have size 2 in dimension 0, query's batch \(got"),
            ({"key": torch.zeros(2, 2, 5, 4)}, r"key must have size 3 in dimension 3, query's D \(got"),
            ({"value": torch.zeros(2, 1, 5, 2)}, r"value must have size 2 in dimension 1, key's heads \(got"),
            ({"value": torch.zeros(2, 2, 6, 2)}, r"value must have size 5 in dimension 2, key's rows \(got"),
            (
                {"key": torch.zeros(2, 3, 5, 3), "value": torch.zeros(2, 3, 5, 2)},
                r"query must have a multiple of key's 3 heads \(got 2\)",
            ),
            ({"kv_lens": torch.tensor([1])}, r"kv_lens must have size 2 in dimension 0, query's batch \(got \[1\]\)"),
            ({"kv_lens": torch.tensor([[1, 2]])}, r"kv_lens must have the shape \[B\] \(got \[1, 2\]\)"),
            (
                {"kv_lens": torch.tensor([1.0, 2.0])},
                r"kv_lens must be torch.int32 or torch.int64 \(got torch.float32\)",
            ),
            ({"kv_lens": torch.tensor([1, 6])}, r"kv_lens must lie in 0..M = 5 \(got 6 for batch element 1\)"),
            ({"kv_lens": torch.tensor([-1, 5])}, r"kv_lens must lie in 0..M = 5 \(got -1 for batch element 0\)"),
            ({"dropout_p": 1.5, "seed": torch.tensor(1)}, r"dropout_p must lie in 0..1 \(got 1.5\)"),
            ({"dropout_p": torch.nan, "seed": torch.tensor(1)}, r"dropout_p must lie in 0..1 \(got nan\)"),
            ({"dropout_p": 0.5}, r"seed must be given with dropout_p > 0 \(got None\)"),
            ({"dropout_p": 0.5, "seed": torch.tensor([1, 2])}, r"seed must have one element \(got \[2\]\)"),
            ({"seed": torch.tensor(1.0)}, r"seed must be torch.int64 \(got torch.float32\)"),
            ({"score": "cosine"}, r'score must be "dot" or "gaussian" \(got "cosine"\)'),
        ],
        ids=str,
    )
    def test_malformed_arguments(self, change: dict[str, Any], message: str) -> None:
        self.refuse(change, message)

    def refuse(self, change: dict[str, Any], message: str) -> None:
        """A changed argument must be refused, forward and backward, by the op's name and this message."""
        problem = self.cases[0].problem(torch.float32)
        arguments = self.named(problem)
        with torch.no_grad():
            output, logsumexp = problem.forward()
        backward = {"grad_output": output, "output": output, "logsumexp": logsumexp, "output_mask": [True] * 4}
        forward_op = getattr(torch.ops.fiak, self.op)
        with pytest.raises(RuntimeError, match=rf"^{self.op}: ({message})"):
            forward_op(**{**arguments, **change})
        with pytest.raises(RuntimeError, match=rf"^{self.op}_backward: ({message})"):
            getattr(torch.ops.fiak, self.op + "_backward")(**{**arguments, **backward, **change})

    def named(self, problem: Problem) -> dict[str, Any]:
        """All of the op's arguments by name."""
        schema = getattr(torch.ops.fiak, self.op).default._schema
        names = [argument.name for argument in schema.arguments if not argument.kwarg_only]
        return {**dict(zip(names, problem.arguments(), strict=True)), **problem.options}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"grad_output": torch.zeros(2, 2, 4, 3)},
                r"grad_output must have size 2 in dimension 3, value's Dv \(got",
            ),
            ({"grad_output": torch.zeros(2, 2, 4, 2).half()}, r"grad_output must have the dtype of query"),
            ({"output": torch.zeros(2, 2, 3, 2)}, r"output must have size 4 in dimension 2, as query \(got"),
            ({"logsumexp": torch.zeros(2, 2)}, r"logsumexp must have the shape \[B, Hq, N\] \(got \[2, 2\]\)"),
            (
                {"logsumexp": torch.zeros(2, 2, 4).double()},
                r"logsumexp must be torch.float32 with torch.float32 inputs",
            ),
        ],
        ids=str,
    )
    def test_malformed_backward_arguments(self, change: dict[str, Any], message: str) -> None:
        problem = self.cases[0].problem(torch.float32)
        output, logsumexp = problem.forward()
        backward = {"grad_output": output, "output": output, "logsumexp": logsumexp, "output_mask": [True] * 4}
        with pytest.raises(RuntimeError, match=rf"^{self.op}_backward: {message}"):
            getattr(torch.ops.fiak, self.op + "_backward")(**{**self.named(problem), **backward, **change})

    def test_unknown_instruction_set(self) -> None:
        with cpu_isa("sse9"), pytest.raises((RuntimeError, ValueError), match=r"FIAK_CPU_ISA must be .* sse9"):
            self.cases[0].problem().public()

    def test_devices_without_kernels_are_named(self) -> None:
        problem = self.cases[0].problem()
        query = problem.tensors[0].to_sparse()
        with pytest.raises(
            NotImplementedError, match=f"fiak::{self.op}_forward: has kernels for strided CPU tensors only"
        ):
            problem.forward(query)


class _Recorder(TorchDispatchMode):
    """The fiak ops that reach the dispatcher below autograd, and their keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fiak":
            self.calls.append((func.name(), kwargs or {}))
        return func(*args, **(kwargs or {}))


def _qkv(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key and value of 2 elements, 2 heads, 6 queries and 20 keys, and a mask that leaves no row empty."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 2, rows, 7, generator=generator, dtype=torch.float64).to(dtype) for rows in (6, 20, 20)
    )
    mask = torch.rand(2, 6, 20, generator=generator) < 0.6
    mask[:, :, 0] = True
    return query, key, value, mask


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
