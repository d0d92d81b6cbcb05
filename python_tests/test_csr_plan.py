"""fiak::csr_plan. What csr_attention makes of plans, and of malformed patterns, is in test_csr_attention.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import csr_of
from torch import Tensor

import fiak_ext
from fiak_ext import _C

csr_plan = torch.ops.fiak.csr_plan


def _pattern(rows: int, columns: int, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    return csr_of(torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < 0.5, dtype)


@pytest.mark.parametrize("queries", [0, 1, 7, 65535, 65536, 65537, 140000])
@pytest.mark.parametrize("keys", [0, 1, 5, 65535, 65536, 65537])
@pytest.mark.parametrize("heads", [0, 1, 3])
def test_meta_knows_the_size(heads: int, queries: int, keys: int) -> None:
    crow = torch.zeros(heads * queries + 1, dtype=torch.int32)
    col = torch.arange(min(keys, 100), dtype=torch.int32) if crow.numel() > 1 else torch.zeros(0, dtype=torch.int32)
    crow[1:] = col.numel()
    plan = csr_plan(crow, col, queries, keys)
    assert plan.dtype == torch.uint8
    assert csr_plan(crow.to("meta"), col.to("meta"), queries, keys).shape == plan.shape


def test_same_pattern_same_bytes() -> None:
    narrow, wide = (csr_plan(*_pattern(12, 9, dtype), 4, 9) for dtype in (torch.int32, torch.int64))
    assert torch.equal(narrow, wide)


def test_size_depends_on_shapes_and_nnz_only() -> None:
    crow, col = torch.tensor([0, 2, 2, 4]), torch.tensor([0, 3, 1, 2])
    other = torch.tensor([0, 0, 1, 4]), torch.tensor([0, 1, 2, 3])
    assert csr_plan(crow, col, 3, 4).shape == csr_plan(*other, 3, 4).shape


@pytest.mark.parametrize(
    ("rows", "queries", "keys", "entries"),
    [
        (1024, 256, 256, 256),  # all pairs, with bits
        (1024, 256, 256, 20),
        (1024, 1, 256, 256),
        (70_000, 70_000, 70_000, 3),
        (65_537, 65_537, 65_537, 10),
        (1_000_000, 1_000_000, 1_000_000, 10),
        (64, 64, 1_000_000, 100),
        (1_000_000, 1_000_000, 8, 1),
        (7, 7, 100_000_000, 5),
        (12, 3, 2**31 - 1, 100),
        (8, 8, 4096, 1),
        (197 * 12, 197, 197, 13),
    ],
)
def test_memory_is_at_most_two_and_a_half_times_the_pattern(rows: int, queries: int, keys: int, entries: int) -> None:
    crow = torch.arange(0, rows * entries + 1, entries, dtype=torch.int32)
    first = torch.arange(rows) * 12345 % (keys - entries + 1)
    col = (first[:, None] + torch.arange(entries)).flatten().int()
    plan = csr_plan(crow, col, queries, keys)
    assert plan.nbytes <= 2.5 * (crow.nbytes + col.nbytes) + 1024
    assert csr_plan(crow.to("meta"), col.to("meta"), queries, keys).shape == plan.shape


@pytest.mark.parametrize("name", ["num_queries", "num_keys"])
@pytest.mark.parametrize("size", [2**31, 2**40, 2**60, 2**62, 2**63 - 1])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sizes_whose_products_overflow(name: str, size: int, device: str) -> None:
    crow, col = (torch.zeros(n, dtype=torch.int64, device=device) for n in (1, 0))
    sizes = {"num_queries": 1, "num_keys": 4, name: size}
    with pytest.raises(RuntimeError, match=rf"^csr_plan: {name} must be at most 2147483647 \(got {size}\)"):
        csr_plan(crow, col, **sizes)


def test_more_rows_and_entries_than_memory_has() -> None:
    many, few = (torch.zeros(1, dtype=torch.int64, device="meta").expand(n) for n in (2**60 + 1, 2))
    with pytest.raises(RuntimeError, match=r"^csr_plan: crow_indices must have at most 2\^48 elements"):
        csr_plan(many, few, 1, 4)
    with pytest.raises(RuntimeError, match=r"^csr_plan: col_indices must have at most 2\^48 elements"):
        csr_plan(few, many, 1, 4)


def test_opcheck() -> None:
    for dtype, queries in itertools.product((torch.int32, torch.int64), (4, 12)):
        torch.library.opcheck(csr_plan.default, (*_pattern(12, 9, dtype), queries, 9))


def test_indices_without_contiguous_memory() -> None:
    crow, col = _pattern(12, 9)
    strided = [torch.stack([x, x], 1)[:, 1] for x in (crow, col)]
    assert torch.equal(csr_plan(*strided, 4, 9), csr_plan(crow, col, 4, 9))


@pytest.mark.parametrize(
    ("crow", "col", "queries", "keys", "message"),
    [
        ([0, 1], [0], -1, 4, r"num_queries must not be negative \(got -1\)"),
        ([0, 1], [0], 1, -4, r"num_keys must not be negative \(got -4\)"),
        (
            [0, 1],
            [0],
            2,
            4,
            r"crow_indices must have G \* Hq \* num_queries \+ 1 elements with num_queries = 2 \(got 2\)",
        ),
        (
            [0, 1],
            [0],
            0,
            4,
            r"crow_indices must have G \* Hq \* num_queries \+ 1 elements with num_queries = 0 \(got 2\)",
        ),
        ([], [], 1, 4, r"crow_indices must have rows \+ 1 elements \(got 0\)"),
        ([[0, 1]], [0], 1, 4, r"crow_indices must have the shape \[rows \+ 1\] \(got \[1, 2\]\)"),
        ([0, 1], [[0]], 1, 4, r"col_indices must have the shape \[nnz\] \(got \[1, 1\]\)"),
        ([0.0, 1.0], [0], 1, 4, r"crow_indices must be torch.int32 or torch.int64 \(got torch.float32\)"),
        ([1, 1], [0], 1, 4, r"crow_indices must start with 0 \(got 1\)"),
        ([0, 2, 1], [0, 1], 1, 4, r"crow_indices must not decrease \(got 1 after 2 at row 1\)"),
        ([0, 1], [0, 1], 1, 4, r"crow_indices must end with the number of col_indices, 2 \(got 1\)"),
        ([0, 1], [4], 1, 4, r"col_indices must lie in 0..3 \(got 4 in row 0\)"),
        ([0, 1], [0], 1, 0, r"col_indices must lie in 0..-1 \(got 0 in row 0\)"),
        ([0, 0, 1], [-2], 1, 4, r"col_indices must lie in 0..3 \(got -2 in row 1\)"),
        ([0, 2], [2, 1], 1, 4, r"col_indices must ascend within a row, without duplicates \(got 1 after 2 in row 0\)"),
        ([0, 2], [2, 2], 1, 4, r"col_indices must ascend within a row, without duplicates \(got 2 after 2 in row 0\)"),
    ],
    ids=str,
)
def test_malformed(crow: list[int], col: list[int], queries: int, keys: int, message: str) -> None:
    indices = [torch.tensor(x) if x else torch.zeros(0, dtype=torch.int64) for x in (crow, col)]
    with pytest.raises(RuntimeError, match=f"^csr_plan: {message}"):
        csr_plan(*indices, queries, keys)


def test_index_dtypes_must_be_alike() -> None:
    crow, col = _pattern(12, 9)
    with pytest.raises(RuntimeError, match=r"^csr_plan: col_indices must have the dtype of crow_indices, torch.int64"):
        csr_plan(crow, col.int(), 4, 9)


def test_devices_without_kernels_are_named() -> None:
    crow, col = _pattern(12, 9)
    with pytest.raises(NotImplementedError, match=r"fiak::csr_plan: has kernels for strided CPU tensors only"):
        csr_plan(crow.to_sparse(), col, 4, 9)


def test_a_summary_says_what_each_head_has_to_do() -> None:
    mask = torch.zeros(2, 30, 40, dtype=torch.bool)
    mask[0] = True
    mask[1, 25, 3:20] = mask[1, 0, 0] = True  # of the 2 x 3 tiles of 24 queries and 16 keys: one above, two below
    pattern = fiak_ext.SparsePattern.from_mask(mask)
    summary = torch.ops.fiak.csr_plan_summary(pattern.plan, 2)
    assert summary.dtype == torch.int64 and summary.tolist() == [[1200, 6], [18, 3]]
    thin = fiak_ext.SparsePattern.from_window(1, 4000, window_size=(1, 0))
    assert torch.ops.fiak.csr_plan_summary(thin.plan, 1).tolist() == [[7999, -1]]  # no bits
    torch.library.opcheck(torch.ops.fiak.csr_plan_summary.default, (pattern.plan, 2))
    query, key, value = (torch.randn(1, 2, n, 8) for n in (30, 40, 40))
    indices = pattern.crow_indices, pattern.col_indices
    expected = pattern.attend(query, key, value)
    output = torch.ops.fiak.csr_attention(query, key, value, *indices, plan=pattern.plan, summary=summary)
    assert torch.equal(output, expected)


def test_a_summary_that_is_not_the_plans_is_refused() -> None:
    pattern = fiak_ext.SparsePattern.from_mask(torch.ones(2, 6, 8, dtype=torch.bool))
    for plan, message in (
        (pattern.plan[:-1], "plan must have the size that its header names"),
        (pattern.plan[:8], "plan must come from csr_plan; it is too short"),
        (torch.zeros_like(pattern.plan), ".*its first bytes are not a plan's"),
        (pattern.plan.float(), "plan must be torch.uint8"),
        (pattern.plan[None], r"plan must have the shape \[bytes\]"),
    ):
        with pytest.raises(RuntimeError, match=f"csr_plan_summary: {message}"):
            torch.ops.fiak.csr_plan_summary(plan, 2)
    with pytest.raises(RuntimeError, match=r"csr_plan_summary: heads must be the plan's 2 \(got 3\)"):
        torch.ops.fiak.csr_plan_summary(pattern.plan, 3)
    changed = pattern.plan.clone()
    changed[32:40] = torch.tensor([2**20]).view(torch.uint8)  # num_keys
    with pytest.raises(RuntimeError, match="csr_plan_summary: plan must have the size and layout"):
        torch.ops.fiak.csr_plan_summary(changed, 2)
    query, key = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 8, 8)
    summary = torch.ops.fiak.csr_plan_summary(pattern.plan, 2)
    cases: list[tuple[Tensor, Tensor | None, str]] = [
        (summary.int(), pattern.plan, r"summary must be torch.int64 \(got torch.int32\)"),
        (summary[:, :1], pattern.plan, "summary must have size 2 in dimension 1, entries and tiles"),
        (summary.repeat(3, 1)[:5], pattern.plan, r"summary must have a row for each head of .* 12 rows \(got 5 rows\)"),
        (summary, None, "plan must be given with its summary"),
    ]
    for given, given_plan, message in cases:
        with pytest.raises(RuntimeError, match=f"csr_attention: {message}"):
            indices = pattern.crow_indices, pattern.col_indices
            torch.ops.fiak.csr_attention(query, key, key, *indices, plan=given_plan, summary=given)


def test_python_reads_the_sections_of_a_plan() -> None:
    pattern = fiak_ext.SparsePattern.from_mask(torch.rand(3, 20, 30) < 0.4)
    plan = pattern.plan
    found = _C.read_plan(plan[: _C.PLAN_HEADER_BYTES].numpy().tobytes())
    sizes = {name: found[name] for name in ("num_rows", "num_queries", "num_keys", "nnz", "bytes")}
    assert sizes == {"num_rows": 60, "num_queries": 20, "num_keys": 30, "nnz": pattern.nnz, "bytes": plan.numel()}

    def section(name: str, dtype: torch.dtype) -> torch.Tensor:
        start, width, count = found["sections"][name]
        assert width == dtype.itemsize and start % 64 == 0
        return plan[start : start + width * count].view(dtype)

    assert torch.equal(section("row_offsets", torch.int32), pattern.crow_indices)
    assert torch.equal(section("columns", torch.int16).int(), pattern.col_indices)
    mask = pattern.to_mask()[0]
    assert torch.equal(section("column_offsets", torch.int32).diff(), mask.sum(1).flatten().int())
    assert torch.equal(section("rows", torch.int16).long(), mask.transpose(1, 2).nonzero()[:, 2])
    assert section("bits", torch.int64).numel() == 60 and section("tiles", torch.int64).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match=r"plan must hold a header of \d+ bytes \(got 8\)"):
        _C.read_plan(b"FiPlan03")
