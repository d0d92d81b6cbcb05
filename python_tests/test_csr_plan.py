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


def test_memory_is_at_most_10_bytes_an_entry() -> None:
    crow, col = csr_of(torch.ones(4 * 256, 256, dtype=torch.bool))
    fixed = 8 * (4 * 256 + 4 * 256) + 1024
    assert csr_plan(crow, col, 256, 256).numel() <= 10 * col.numel() + fixed


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
