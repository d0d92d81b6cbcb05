"""fiak::csr_attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CSR_CASES, LARGE_CSR_CASES, Case, cpu_isa, csr_of, error
from suite import AttentionSuite
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fiak_ext import reference

csr_attention = torch.ops.fiak.csr_attention
csr_attention_forward = torch.ops.fiak.csr_attention_forward
csr_plan = torch.ops.fiak.csr_plan


class TestCsrAttention(AttentionSuite):
    op = "csr_attention"
    cases = CSR_CASES
    large_cases = LARGE_CSR_CASES
    kernels = ("entries", "entries_sliced", "dense", "rows")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return csr_attention_forward(query, key, value, *csr_of(mask), **options)

    def weigh(self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        all_pairs = csr_of(torch.ones(weight.shape, dtype=torch.bool))
        return csr_attention_forward(query, key, value, *all_pairs, weight.flatten(), **options)

    @pytest.mark.parametrize("kept", [0.1, 0.5])
    def test_at_most_twice_the_error_of_scaled_dot_product_attention(
        self, isa: str, dtype: torch.dtype, kept: float
    ) -> None:
        query, key, value, mask = _inputs(dtype, kept, queries=197, keys=197, head_dim=48)
        exact, _ = reference.csr_attention(query, key, value, *csr_of(mask))
        theirs = F.scaled_dot_product_attention(query, key, value, mask[None].expand(query.shape[0], -1, -1, -1))
        with cpu_isa(isa):
            ours = csr_attention(query, key, value, *csr_of(mask))
        rounding = torch.finfo(dtype).eps * float(exact.abs().max())
        assert error(ours, exact) <= 2 * error(theirs, exact) + rounding

    @pytest.mark.parametrize(("queries", "keys"), [(2, 65536), (2, 66000), (70, 65537), (66000, 3), (65537, 2)])
    def test_more_rows_or_columns_than_16_bits(self, isa: str, queries: int, keys: int) -> None:
        case = Case("csr_attention", batch=1, key_heads=1, queries=queries, keys=keys, weighted=True)
        problem = case.problem(torch.float32)
        with cpu_isa(isa):
            actual = problem.run()
        exact = problem.run("reference")
        for name, tensor in actual.items():
            wanted = getattr(exact, name).float()
            torch.testing.assert_close(tensor, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()), msg=name)

    def test_gradient_of_values_of_zero(self, isa: str, dtype: torch.dtype) -> None:
        query, key, value, mask = _inputs(dtype)
        crow, col = csr_of(mask)
        values = torch.rand(col.numel(), dtype=torch.float64) + 0.1
        values[::5] = 0
        values[1] = -1
        expected = _grad_of_values(reference.csr_attention, query, key, value, crow, col, values)
        with cpu_isa(isa):
            values = values if dtype == torch.float64 else values.float()
            actual = _grad_of_values(csr_attention_forward, query, key, value, crow, col, values)
        assert (expected[::5].abs() > 1e-6).any()
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.05)
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize(("queries", "keys", "head_dim"), [(1, 1024, 64), (2, 1024, 32), (3, 256, 128)])
    def test_decoding_rows_leave_each_other_alone(
        self, isa: str, dtype: torch.dtype, queries: int, keys: int, head_dim: int
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(1, 4, queries, head_dim, generator=generator).to(dtype)
        key, value = (torch.randn(1, 1, keys, head_dim, generator=generator).to(dtype) for _ in range(2))
        crow, col = csr_of(torch.ones(4, queries, keys, dtype=torch.bool))
        exact, _ = reference.csr_attention(query, key, value, crow, col)
        theirs = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        with cpu_isa(isa):
            ours = csr_attention(query, key, value, crow, col)
        rounding = 4 * torch.finfo(dtype).eps * float(value.abs().max())  # of the terms
        assert error(ours, exact) <= 2 * error(theirs, exact) + rounding

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
    def test_bad_value_makes_its_row_nan(self, isa: str, dtype: torch.dtype, bad: float) -> None:
        query, key, value, mask = _inputs(dtype)
        mask[:, :, 0] = True
        crow, col = csr_of(mask)
        values = torch.ones(col.numel(), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        with cpu_isa(isa):
            clean = csr_attention_forward(query, key, value, crow, col, values)
            values[crow[7]] = bad  # row 2 of head 1
            results = csr_attention_forward(query, key, value, crow, col, values)
        rows = torch.zeros(results[1].shape, dtype=torch.bool)
        rows[:, 1, 2] = True
        for result, before in zip(results, clean, strict=True):
            assert result[rows].isnan().all()
            assert torch.equal(result[~rows], before[~rows])

    def test_values_of_one_are_no_values(self, isa: str, dtype: torch.dtype) -> None:
        query, key, value, mask = _inputs(dtype)
        crow, col = csr_of(mask)
        ones = torch.ones(col.numel(), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        with cpu_isa(isa):
            for x, y in zip(
                csr_attention_forward(query, key, value, crow, col),
                csr_attention_forward(query, key, value, crow, col, ones),
                strict=True,
            ):
                torch.testing.assert_close(x, y)

    def test_plan_and_index_dtype_do_not_change_a_bit(self, isa: str, dtype: torch.dtype) -> None:
        query, key, value, mask = _inputs(dtype)
        with cpu_isa(isa):
            expected = csr_attention(query, key, value, *csr_of(mask))
            for index_dtype in (torch.int32, torch.int64):
                crow, col = csr_of(mask, index_dtype)
                plan = csr_plan(crow, col, *mask.shape[1:])
                assert torch.equal(csr_attention(query, key, value, crow, col, plan=plan), expected)

    def test_a_dense_pattern_is_the_prior_op(self, isa: str, dtype: torch.dtype) -> None:
        query, key, value, mask = _inputs(dtype)
        options = {"dropout_p": 0.3, "seed": torch.tensor(5), "kv_lens": torch.tensor([6, 3])}
        weight = mask.to(torch.float64 if dtype == torch.float64 else torch.float32)[None]
        with cpu_isa(isa):
            ours = csr_attention_forward(query, key, value, *csr_of(mask), **options)
            theirs = torch.ops.fiak.prior_attention_forward(query, key, value, weight, **options)
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y)

    def test_decoding_query_by_query_is_the_full_pass(self, isa: str, dtype: torch.dtype) -> None:
        query, key, value, mask = _inputs(dtype)
        crow, col = csr_of(mask)
        plan = csr_plan(crow, col, *mask.shape[1:])
        options = {"dropout_p": 0.3, "seed": torch.tensor(7), "plan": plan}
        with cpu_isa(isa):
            full = csr_attention(query, key, value, crow, col, **options)
            for start, stop in ((0, 1), (2, 3), (1, 5)):
                offsets = torch.full((query.shape[0],), start, dtype=torch.int32)
                part = csr_attention(query[:, :, start:stop], key, value, crow, col, query_offsets=offsets, **options)
                torch.testing.assert_close(part, full[:, :, start:stop])

    @pytest.mark.parametrize(("queries", "keys", "kept"), [(5, 7, 0.6), (1, 300, 0.5), (40, 200, 0.9), (70, 90, 0.02)])
    def test_keys_that_are_not_there_are_hidden(
        self, isa: str, dtype: torch.dtype, queries: int, keys: int, kept: float
    ) -> None:
        query, key, value, mask = _inputs(dtype, kept, queries, keys)
        crow, col = csr_of(mask)
        plan = csr_plan(crow, col, *mask.shape[1:])
        for there, lens in ((keys - 2, None), (keys // 2, [keys // 2, keys // 3]), (1, [1, 0]), (0, None)):
            kv_lens = torch.tensor(lens or [there, there])
            results = []
            for short in (True, False):
                leaves = [query, *(x[:, :, :there] if short else x for x in (key, value))]
                leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
                options = {"plan": plan, "kv_lens": kv_lens if lens or not short else None}
                with cpu_isa(isa):
                    output, logsumexp = csr_attention_forward(*leaves, crow, col, **options)
                    grads = torch.autograd.grad(output.double().square().sum(), leaves)
                results.append([output, logsumexp, grads[0], *(grad[:, :, :there] for grad in grads[1:])])
            for short_result, result in zip(*results, strict=True):
                tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 0.02)
                torch.testing.assert_close(short_result, result, rtol=tolerance, atol=tolerance)

    def test_more_keys_than_the_pattern_has(self) -> None:
        arguments = self.named(self.cases[0].problem(torch.float32))
        crow, col = arguments["crow_indices"], arguments["col_indices"]
        more = {name: torch.cat([arguments[name]] * 2, 2) for name in ("key", "value")}
        self.refuse({"plan": csr_plan(crow, col, 4, 5), **more}, r"key must have at most the pattern's 5 columns")
        fewer = {name: arguments[name][:, :, :3] for name in ("key", "value")}
        change = {"plan": csr_plan(crow, col, 4, 5), "kv_lens": torch.tensor([3, 4]), **fewer}
        self.refuse(change, r"kv_lens must lie in 0..M = 3 \(got 4 for batch element 1\)")

    @pytest.mark.parametrize(("groups", "heads", "key_heads"), [(1, 2, 2), (1, 6, 2), (2, 3, 3), (3, 2, 1)])
    @pytest.mark.parametrize("valued", [False, True])
    def test_a_pattern_that_all_heads_share(
        self, isa: str, dtype: torch.dtype, groups: int, heads: int, key_heads: int, valued: bool
    ) -> None:
        case = Case(
            "csr_attention", batch=2 * groups, query_heads=heads, key_heads=key_heads, queries=20, keys=33, head_dim=8
        )
        query, key, value, _ = case.problem(dtype).tensors
        mask = torch.rand(groups, 1, 20, 33, generator=torch.Generator().manual_seed(2)) < 0.4
        weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(3)) + 0.5
        results = []
        for shared in (True, False):
            own = mask if shared else mask.expand(-1, heads, -1, -1)
            values = weights.expand(own.shape)[own].to(torch.float64 if dtype == torch.float64 else torch.float32)
            leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
            if valued:
                leaves.append(values.requires_grad_())
            crow, col = csr_of(own.flatten(0, 1))
            given = leaves if valued else [*leaves, None]
            with cpu_isa(isa):
                output, logsumexp = csr_attention_forward(*given[:3], crow, col, given[3])
                assert torch.equal(
                    output, csr_attention(*given[:3], crow, col, given[3], plan=csr_plan(crow, col, 20, 33))
                )
                grads = list(torch.autograd.grad(output.double().square().sum(), leaves))
            if valued:
                dense = grads[3].new_zeros(own.shape).masked_scatter(own, grads[3])
                grads[3] = dense.sum(1)
            results.append([output, logsumexp, *grads])
        for ours, theirs in zip(*results, strict=True):
            tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 0.02)
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)

    def test_heads_before_groups(self) -> None:
        """Of 2 heads, 2 patterns are one for each, not one for each of 2 groups."""
        query, key, value, mask = _inputs(torch.float64)
        crow, col = csr_of(mask)
        output = csr_attention(query, key, value, crow, col)
        for head in range(2):
            own = csr_attention(*(x[:, head : head + 1] for x in (query, key, value)), *csr_of(mask[head : head + 1]))
            torch.testing.assert_close(output[:, head : head + 1], own)

    def test_plan_with_fewer_queries_starts_at_row_0(self) -> None:
        query, key, value, mask = _inputs(torch.float64)
        crow, col = csr_of(mask)
        plan = csr_plan(crow, col, *mask.shape[1:])
        expected = csr_attention(query, key, value, crow, col)[:, :, :3]
        torch.testing.assert_close(csr_attention(query[:, :, :3], key, value, crow, col, plan=plan), expected)

    def test_indices_without_contiguous_memory(self) -> None:
        query, key, value, mask = _inputs(torch.float64)
        crow, col = csr_of(mask)
        strided = [torch.stack([x, torch.full_like(x, -1)], 1)[:, 0] for x in (crow, col)]
        values = torch.rand(col.numel(), 2, dtype=torch.float64)[:, 0]
        assert torch.equal(
            csr_attention(query, key, value, *strided, values),
            csr_attention(query, key, value, crow, col, values.contiguous()),
        )

    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
    def test_torch_sparse_csr_is_a_pattern(self) -> None:
        query, key, value, mask = _inputs(torch.float64)
        matrix = mask.flatten(0, 1).double().to_sparse_csr()
        actual = csr_attention(query, key, value, matrix.crow_indices(), matrix.col_indices())
        assert torch.equal(actual, csr_attention(query, key, value, *csr_of(mask)))

    # Errors. cases[0] has B = 2, Hq = 2, N = 4 and M = 5.

    @pytest.mark.parametrize(
        ("crow", "col", "message"),
        [
            ([1, 1, 1, 1, 1, 1, 1, 1, 1], [0], r"crow_indices must start with 0 \(got 1\)"),
            ([0, 2, 1, 2, 2, 2, 2, 2, 2], [0, 1], r"crow_indices must not decrease \(got 1 after 2 at row 1\)"),
            ([0, 1, 1, 1, 1, 1, 1, 1, 3], [0, 1], r"crow_indices must end with the number of col_indices, 2 \(got 3\)"),
            ([0, 9, 1, 1, 1, 1, 1, 1, 1], [0], r"crow_indices must not decrease \(got 1 after 9 at row 1\)"),
            ([0, -5, 1, 1, 1, 1, 1, 1, 1], [0], r"crow_indices must not decrease \(got -5 after 0 at row 0\)"),
            ([0, 1, 1, 1, 1, 1, 1, 1, 1], [5], r"col_indices must lie in 0..4 \(got 5 in row 0\)"),
            ([0, 0, 0, 1, 1, 1, 1, 1, 1], [-1], r"col_indices must lie in 0..4 \(got -1 in row 2\)"),
            ([0, 2, 2, 2, 2, 2, 2, 2, 2], [3, 1], r"col_indices must ascend within a row.*\(got 1 after 3 in row 0\)"),
            ([0, 2, 2, 2, 2, 2, 2, 2, 2], [3, 3], r"col_indices must ascend within a row.*\(got 3 after 3 in row 0\)"),
            ([0, 0, 0], [], r"crow_indices must have G \* Hq \* N \+ 1 elements, .* with Hq = 2 and N = 4 \(got 3\)"),
            ([0], [], r"crow_indices must have G >= 1 groups \(got 0\)"),
            ([], [], r"crow_indices must have rows \+ 1 elements \(got 0\)"),
            ([0] * 25, [], r"crow_indices must have a number of groups G that divides B = 2 \(got 3\)"),
            ([[0] * 9], [], r"crow_indices must have the shape \[rows \+ 1\] \(got \[1, 9\]\)"),
            ([0] * 9, [[]], r"col_indices must have the shape \[nnz\] \(got \[1, 0\]\)"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
    def test_malformed_pattern(self, crow: list[int], col: list[int], message: str, index_dtype: torch.dtype) -> None:
        indices = [torch.tensor(x, dtype=index_dtype) for x in (crow, col)]
        self.refuse({"crow_indices": indices[0], "col_indices": indices[1]}, message)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"crow_indices": torch.zeros(9)},
                r"crow_indices must be torch.int32 or torch.int64 \(got torch.float32\)",
            ),
            ({"crow_indices": torch.zeros(9).int()}, r"col_indices must have the dtype of crow_indices, torch.int32"),
            ({"col_indices": torch.zeros(3, dtype=torch.int64, device="meta")}, r"col_indices must be on the device"),
            ({"prior": torch.zeros(1)}, r"prior must have size \d+ in dimension 0, the number of col_indices \(got"),
            ({"prior": torch.zeros(1, 1)}, r"prior must have the shape \[nnz\] \(got \[1, 1\]\)"),
            ({"prior": torch.zeros(1).double()}, r"prior must be torch.float32 with torch.float32 inputs \(got"),
            ({"query_offsets": torch.tensor([0, 0])}, r"plan must be given with query_offsets; .*csr_plan makes it"),
            ({"query_offsets": torch.tensor([0])}, r"query_offsets must have size 2 in dimension 0, query's batch"),
            ({"plan": torch.zeros(8)}, r"plan must be torch.uint8 \(got torch.float32\)"),
            ({"plan": torch.zeros(2, 8).byte()}, r"plan must have the shape \[bytes\] \(got \[2, 8\]\)"),
            ({"plan": torch.zeros(8).byte()}, r"plan must come from csr_plan; it is too short \(got 8\)"),
            ({"plan": torch.zeros(999).byte()}, r"plan must come from csr_plan of this version"),
        ],
        ids=str,
    )
    def test_malformed_indices_values_and_plans(self, change: dict[str, Any], message: str) -> None:
        self.refuse(change, message)

    def test_plan_of_another_pattern(self, monkeypatch: pytest.MonkeyPatch) -> None:
        arguments = self.named(self.cases[0].problem(torch.float32))
        crow, col = arguments["crow_indices"], arguments["col_indices"]
        plan = csr_plan(crow, col, 4, 5)
        for other, message in [
            (csr_plan(crow[:5], col[: crow[4]], 4, 5), r"plan must be made for this pattern of 8 rows and"),
            (csr_plan(crow, col, 2, 5), r"query must have at most the pattern's 2 rows \(got 4\)"),
            (plan[:-64], r"plan must have the size that its header names \(got \d+\)"),
        ]:
            self.refuse({"plan": other}, message)
        crow_8, col_8 = torch.arange(9), torch.tensor([0, 1] * 4)
        for other, message in [
            (csr_plan(crow_8, col_8 + 1, 4, 5), r"plan must be made for these col_indices; they differ at index 0"),
            (
                csr_plan((crow_8 + 1) // 2 * 2 - 2 * (crow_8 % 2), col_8, 4, 5),
                r"plan must be made for these crow_indices",
            ),
        ]:
            self.refuse({"crow_indices": crow_8, "col_indices": col_8, "plan": other}, message)
        for offsets in ([0, 1], [-1, 0]):
            change = {"plan": plan, "query_offsets": torch.tensor(offsets)}
            self.refuse(change, r"query_offsets must lie in 0..num_queries - N = 0 \(got")
        torn = plan.clone()
        torn[-70:-64] ^= 1  # the body, which is trusted otherwise
        monkeypatch.setenv("FIAK_CHECK_PLANS", "1")
        csr_attention(**{**arguments, "plan": plan})
        self.refuse({"plan": torn}, r"plan must be what csr_plan makes of this pattern; its body differs")

    def test_cuda_wants_a_plan(self) -> None:
        with FakeTensorMode():
            query = torch.empty(1, 2, 3, 4, device="cuda")
            crow, col = (
                torch.zeros(7, dtype=torch.int32, device="cuda"),
                torch.zeros(0, dtype=torch.int32, device="cuda"),
            )
            with pytest.raises(RuntimeError, match=r"^csr_attention: plan must be given with CUDA tensors.*csr_plan"):
                csr_attention(query, query, query, crow, col)


def _inputs(
    dtype: torch.dtype, kept: float = 0.6, queries: int = 5, keys: int = 7, head_dim: int = 6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key and value of 2 elements and 2 heads, and a mask [2, queries, keys]."""
    case = Case("csr_attention", queries=queries, keys=keys, head_dim=head_dim, value_dim=head_dim)
    query, key, value, _ = case.problem(dtype).tensors
    return query, key, value, torch.rand(2, queries, keys, generator=torch.Generator().manual_seed(2)) < kept


def _grad_of_values(op: Any, *arguments: Tensor) -> Tensor:
    *others, values = arguments
    values = values.detach().requires_grad_()
    output, _ = op(*others, values)
    return torch.autograd.grad(output[..., 0].square().sum(), values)[0]
