"""fiak::csr_plan. What csr_attention makes of plans, and of malformed patterns, is in test_csr_attention.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import csr_of
from torch import Tensor

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
