"""``SparsePattern`` against the boolean mask that it stands for."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from counting import BytesMade
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from fiak_ext import PriorAttention, SparsePattern, reference

SIZES = [(1, 4, 7, 9), (3, 2, 5, 5), (1, 1, 1, 1), (2, 3, 0, 4), (1, 2, 4, 0), (1, 2, 300, 17)]


def random_mask(*sizes: int, density: float = 0.3, seed: int = 0) -> Tensor:
    return torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) < density


@pytest.fixture(params=SIZES, ids=str)
def mask(request: pytest.FixtureRequest) -> Tensor:
    return random_mask(*request.param)


def test_mask_round_trip(mask: Tensor) -> None:
    pattern = SparsePattern.from_mask(mask)
    assert torch.equal(pattern.to_mask(), mask)
    assert (pattern.groups, pattern.num_heads, pattern.num_queries, pattern.num_keys) == mask.shape
    assert pattern.crow_indices.dtype == pattern.col_indices.dtype == torch.int32


def test_a_mask_without_groups_is_one_group() -> None:
    mask = random_mask(4, 7, 9)
    assert SparsePattern.from_mask(mask) == SparsePattern.from_mask(mask[None])


def test_a_mask_in_any_memory_order() -> None:
    mask = random_mask(4, 9, 7).transpose(1, 2)
    assert torch.equal(SparsePattern.from_mask(mask).to_mask()[0], mask)


def test_torch_csr_round_trip(mask: Tensor) -> None:
    groups, heads, queries, keys = mask.shape
    pattern = SparsePattern.from_mask(mask)
    matrix = pattern.to_torch_csr()
    assert matrix.shape == (groups * heads * queries, keys)
    assert torch.equal(matrix.to_dense().view(mask.shape), mask.float())
    assert SparsePattern.from_torch_csr(matrix, heads, groups) == pattern


def test_torch_csr_carries_values_with_gradient() -> None:
    pattern = SparsePattern.from_mask(random_mask(2, 3, 4))
    values = torch.randn(pattern.nnz, dtype=torch.float64, requires_grad=True)
    pattern.to_torch_csr(values).to_dense().square().sum().backward()
    torch.testing.assert_close(values.grad, 2 * values.detach())


def test_what_it_holds(mask: Tensor) -> None:
    pattern = SparsePattern.from_mask(mask)
    pairs = max(mask[0, 0].numel(), 1)
    assert pattern.nnz == int(mask.sum())
    assert pattern.density == pytest.approx(pattern.nnz / max(mask.numel(), 1))
    torch.testing.assert_close(pattern.density_per_head(), mask.sum((2, 3)).double() / pairs)
    assert torch.equal(pattern.empty_rows(), ~mask.any(3))
    assert torch.equal(pattern.empty_columns(), ~mask.any(2))
    assert pattern.num_bytes == 4 * (mask.shape[:3].numel() + 1 + pattern.nnz)


def test_int64_indices_become_int32() -> None:
    pattern = SparsePattern.from_csr(torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1]), 1, 2, 3)
    assert pattern.crow_indices.dtype == pattern.col_indices.dtype == torch.int32
    assert pattern.to_mask()[0, 0].tolist() == [[False, False, True], [True, True, False]]


# ---------------------------------------------------------------- other patterns from it


def test_crop(mask: Tensor) -> None:
    pattern = SparsePattern.from_mask(mask)
    queries, keys = mask.shape[2:]
    for n, m in {(queries, keys), (queries // 2, keys), (queries, keys // 2), (0, 0), (queries // 2, keys // 3)}:
        assert pattern.crop(n, m) == SparsePattern.from_mask(mask[:, :, :n, :m])


def test_crop_of_a_square_pattern_needs_one_length() -> None:
    mask = random_mask(2, 6, 6)
    assert SparsePattern.from_mask(mask).crop(4) == SparsePattern.from_mask(mask[:, :4, :4])
    with pytest.raises(ValueError, match=r"crop: num_keys must be given .* \(got 6 queries, 7 keys\)"):
        SparsePattern.from_mask(random_mask(2, 6, 7)).crop(4)


def test_crop_takes_no_size_beyond_its_own() -> None:
    pattern = SparsePattern.from_mask(random_mask(2, 6, 7))
    with pytest.raises(ValueError, match=r"num_queries must be in 0\.\.6 \(got 7\)"):
        pattern.crop(7, 7)
    with pytest.raises(ValueError, match=r"num_keys must be in 0\.\.7 \(got -1\)"):
        pattern.crop(6, -1)


def test_rows(mask: Tensor) -> None:
    pattern = SparsePattern.from_mask(mask)
    queries = mask.size(2)
    for start, stop in {(0, queries), (queries // 2, queries), (queries // 3, queries // 2), (queries, queries)}:
        assert pattern.rows(start, stop) == SparsePattern.from_mask(mask[:, :, start:stop])
    with pytest.raises(ValueError, match=rf"0 <= start <= stop <= {queries} \(got 0, {queries + 1}\)"):
        pattern.rows(0, queries + 1)


@pytest.mark.parametrize(("groups", "heads", "key_heads"), [(1, 4, 4), (1, 4, 2), (3, 4, 1), (2, 2, 2)])
def test_compact(groups: int, heads: int, key_heads: int) -> None:
    mask = random_mask(groups, heads, 6, 13, density=0.08, seed=groups)
    mask[:, 0] = False  # the first head keeps nothing
    pattern, keep = SparsePattern.from_mask(mask).compact(key_heads)
    needed = [set() for _ in range(key_heads)]  # type: list[set[int]]
    for _, head, _, key in mask.nonzero().tolist():
        needed[head // (heads // key_heads)].add(key)
    size = max(map(len, needed))
    assert keep.tolist() == [sorted(keys) + [-1] * (size - len(keys)) for keys in needed]
    assert (pattern.num_queries, pattern.num_keys) == (6, size)
    restored = torch.zeros_like(mask)
    for group, head, query, key in pattern.to_mask().nonzero().tolist():
        restored[group, head, query, keep[head // (heads // key_heads), key]] = True
    assert torch.equal(restored, mask)


def test_compact_of_nothing() -> None:
    pattern, keep = SparsePattern.from_mask(torch.zeros(2, 3, 4, dtype=torch.bool)).compact()
    assert (pattern.num_keys, pattern.nnz, tuple(keep.shape)) == (0, 0, (2, 0))


def test_compact_needs_key_heads_that_divide() -> None:
    with pytest.raises(ValueError, match=r"num_key_heads must divide the number of heads \(got 3 key heads, 4 heads\)"):
        SparsePattern.from_mask(random_mask(4, 3, 3)).compact(3)


# ---------------------------------------------------------------- Python protocols


def test_copies(mask: Tensor) -> None:
    pattern = SparsePattern.from_mask(mask)
    _ = pattern.plan
    for copied in (pattern.clone(), copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert copied == pattern
        assert copied._plan is None
        assert pattern.nnz == 0 or copied.col_indices.data_ptr() != pattern.col_indices.data_ptr()
    assert pattern.to("cpu") is pattern
    assert pattern.to("meta").device.type == "meta"


def test_state_dict_survives_a_file(mask: Tensor) -> None:
    pattern = SparsePattern.from_mask(mask)
    file = io.BytesIO()
    torch.save(pattern.state_dict(), file)
    file.seek(0)
    assert SparsePattern.from_state_dict(torch.load(file, weights_only=True)) == pattern


def test_equality_is_by_content() -> None:
    mask = random_mask(2, 5, 5)
    pattern = SparsePattern.from_mask(mask)
    other = mask.clone()
    other[1, 4, 4] ^= True
    assert pattern == SparsePattern.from_mask(mask)
    assert pattern != SparsePattern.from_mask(other)
    assert pattern != SparsePattern.from_mask(mask.view(2, 1, 5, 5))
    assert pattern != "pattern"
    with pytest.raises(TypeError, match="unhashable"):
        hash(pattern)


def test_repr() -> None:
    pattern = SparsePattern.from_mask(torch.ones(2, 3, 4, dtype=torch.bool))
    assert repr(pattern) == (
        "SparsePattern(num_heads=2, num_queries=3, num_keys=4, groups=1, nnz=24, density=1.0000, device='cpu')"
    )


# ---------------------------------------------------------------- malformed input


@pytest.mark.parametrize(
    ("crow", "col"),
    [
        ([1, 2, 3], [0, 1, 2]),  # does not start at 0
        ([0, 2, 1], [0]),  # decreases
        ([0, 1, 4], [0, 1, 2]),  # does not end at nnz
        ([0, 1, 2], [0, 3]),  # out of range
        ([0, 1, 2], [0, -1]),
        ([0, 0, 2], [2, 1]),  # unsorted
        ([0, 0, 2], [1, 1]),  # duplicated
        ([0, 2**40, 2], [0, 1]),
    ],
)
def test_malformed_indices_are_refused(crow: list[int], col: list[int]) -> None:
    arguments = (torch.tensor(crow), torch.tensor(col), 1, 2, 3)
    with pytest.raises(RuntimeError, match=r"csr_plan: (crow|col)_indices"):
        SparsePattern.from_csr(*arguments)
    sizes = torch.tensor([1, 1, 2, 3])
    with pytest.raises(RuntimeError, match=r"csr_plan: (crow|col)_indices"):
        SparsePattern.from_state_dict({"crow_indices": arguments[0], "col_indices": arguments[1], "sizes": sizes})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"num_heads": 0}, ValueError, r"num_heads must be at least 1 \(got 0\)"),
        ({"num_queries": -1}, ValueError, r"num_queries must be at least 0 \(got -1\)"),
        ({"num_queries": 3}, ValueError, r"crow_indices must have .* = 4 elements \(got 3\)"),
        ({"groups": 2}, ValueError, r"crow_indices must have .* = 5 elements \(got 3\)"),
        ({"crow_indices": torch.zeros(3)}, TypeError, r"crow_indices must be int32 or int64 \(got torch.float32\)"),
        ({"col_indices": torch.zeros(2, dtype=torch.int8)}, TypeError, r"col_indices must be int32 or int64"),
        ({"col_indices": torch.zeros(1, 2, dtype=torch.int64)}, ValueError, r"col_indices must have one dimension"),
        (
            {"col_indices": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            r"on the device of crow_indices",
        ),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"crow_indices": torch.tensor([0, 1, 2]), "col_indices": torch.tensor([0, 1])}
    arguments |= {"num_heads": 1, "num_queries": 2, "num_keys": 3} | changed
    with pytest.raises(error, match=message):
        SparsePattern(**arguments)


def test_wrong_masks_and_matrices_are_named() -> None:
    with pytest.raises(TypeError, match=r"mask must be bool, True where kept \(got torch.float32\)"):
        SparsePattern.from_mask(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"mask must be \[heads, N, M\] .*got shape \(3, 4\)"):
        SparsePattern.from_mask(torch.zeros(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"matrix must be a sparse CSR matrix \(got torch.strided"):
        SparsePattern.from_torch_csr(torch.zeros(4, 4), 2)
    with pytest.raises(
        ValueError, match=r"must be a multiple of groups \* num_heads \(got 4 rows, 1 groups, 3 heads\)"
    ):
        SparsePattern.from_torch_csr(torch.eye(4).to_sparse_csr(), 3)
    pattern = SparsePattern.from_mask(random_mask(2, 3, 4))
    with pytest.raises(ValueError, match=rf"values must have shape \({pattern.nnz},\) \(got \(1,\)\)"):
        pattern.to_torch_csr(torch.ones(1))


# ---------------------------------------------------------------- attention


def random_inputs(batch: int, heads: int, key_heads: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, heads, queries, 5), (batch, key_heads, keys, 5), (batch, key_heads, keys, 3))
    query, key, value = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return query, key, value


@pytest.mark.parametrize(("groups", "heads", "key_heads"), [(1, 4, 4), (1, 4, 2), (2, 4, 1)])
def test_attend(groups: int, heads: int, key_heads: int) -> None:
    mask = random_mask(groups, heads, 6, 8)
    query, key, value = random_inputs(4, heads, key_heads, 6, 8)
    expected, _ = reference.prior_attention(query, key, value, mask.double())
    torch.testing.assert_close(SparsePattern.from_mask(mask).attend(query, key, value), expected)


def test_attend_to_rows_from_an_offset_with_a_prior() -> None:
    pattern = SparsePattern.from_mask(random_mask(2, 6, 8))
    query, key, value = random_inputs(3, 2, 2, 2, 8)
    values = torch.rand(pattern.nnz, dtype=torch.float64)
    offsets = torch.tensor([4, 0, 1])
    output = pattern.attend(query, key, value, values, query_offsets=offsets, score="gaussian", scale=0.3)
    weights = pattern.to_torch_csr(values).to_dense().view(1, 2, 6, 8)
    for b, offset in enumerate(offsets.tolist()):
        weight = weights[:, :, offset : offset + 2]
        one = slice(b, b + 1)
        expected, _ = reference.prior_attention(query[one], key[one], value[one], weight, score="gaussian", scale=0.3)
        torch.testing.assert_close(output[one], expected)


@pytest.mark.parametrize(("groups", "heads", "key_heads"), [(1, 4, 4), (1, 4, 2), (2, 3, 1)])
def test_attend_with_a_length_for_every_key_head(groups: int, heads: int, key_heads: int) -> None:
    mask = random_mask(groups, heads, 6, 8, density=0.5)
    query, key, value = random_inputs(4, heads, key_heads, 3, 8)
    lens = torch.randint(0, 9, (4, key_heads), generator=torch.Generator().manual_seed(2))
    offsets = torch.tensor([0, 1, 2, 3])
    output = SparsePattern.from_mask(mask).attend(query, key, value, kv_lens=lens, query_offsets=offsets)
    visible = torch.arange(8) < lens.repeat_interleave(heads // key_heads, 1)[:, :, None, None]
    rows = torch.stack([mask[b % groups, :, b : b + 3] for b in range(4)])
    expected, _ = reference.prior_attention(query, key, value, (rows & visible).double())
    torch.testing.assert_close(output, expected)


def test_attend_names_another_number_of_heads() -> None:
    query, key, value = random_inputs(1, 4, 4, 6, 8)
    with pytest.raises(ValueError, match=r"query must be \[batch, 2, queries, head_dim\] \(got shape \(1, 4, 6, 5\)\)"):
        SparsePattern.from_mask(random_mask(2, 6, 8)).attend(query, key, value)


def test_a_plan_made_in_inference_mode_serves_training() -> None:
    pattern = SparsePattern.from_mask(random_mask(2, 6, 8))
    query, key, value = random_inputs(1, 2, 2, 6, 8)
    with torch.inference_mode():
        expected = pattern.attend(query, key, value)
    query.requires_grad_()
    output = pattern.attend(query, key, value)
    torch.testing.assert_close(output.detach(), expected.clone())
    output.sum().backward()
    assert query.grad is not None


# ---------------------------------------------------------------- patterns without a mask


def window_mask(sizes: tuple[int, int], window: tuple[int, int], num_sinks: int, is_causal: bool) -> Tensor:
    query, key = torch.arange(sizes[0])[:, None], torch.arange(sizes[1])
    left, right = (10**6 if size == -1 else size for size in window)
    mask = (key >= query - left) & (key <= query + right) | (key < num_sinks)
    return mask & (key <= query) if is_causal else mask


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_sinks", [0, 2, 50])
@pytest.mark.parametrize("window", [(0, 0), (3, 0), (2, 4), (-1, 0), (0, -1), (-1, -1), (100, 100)])
@pytest.mark.parametrize("sizes", [(12, 12), (5, 17), (17, 5), (0, 3), (3, 0), (1, 1)])
def test_from_window(sizes: tuple[int, int], window: tuple[int, int], num_sinks: int, is_causal: bool) -> None:
    pattern = SparsePattern.from_window(3, *sizes, window_size=window, num_sinks=num_sinks, is_causal=is_causal)
    mask = window_mask(sizes, window, num_sinks, is_causal)[None]
    assert pattern == SparsePattern.from_mask(mask, num_heads=3)
    assert pattern.is_causal == bool((mask == mask.tril()).all())
    _ = pattern.plan


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("sizes", [(12, 12), (13, 7), (5, 30), (1, 1)])
@pytest.mark.parametrize("block_size", [(4, 4), (1, 3), (5, 1), (64, 64)])
def test_from_blocks(block_size: tuple[int, int], sizes: tuple[int, int], groups: int | None, is_causal: bool) -> None:
    counts = [-(-size // block) for size, block in zip(sizes, block_size, strict=True)]
    generator = torch.Generator().manual_seed(0)
    for density in (0.0, 0.4, 1.0):
        blocks = torch.rand(*([] if groups is None else [groups]), 3, *counts, generator=generator) < density
        mask = blocks.repeat_interleave(block_size[0], -2).repeat_interleave(block_size[1], -1)
        mask = mask[..., : sizes[0], : sizes[1]]
        pattern = SparsePattern.from_blocks(blocks, block_size, *sizes, is_causal=is_causal)
        assert pattern == SparsePattern.from_mask(mask.tril() if is_causal else mask)


def sliding(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (query - key < 20 + 30 * head) & (key % 7 != batch)


@pytest.mark.parametrize("sizes", [(128, 128), (200, 77), (48, 300)])
@pytest.mark.parametrize(("batch", "heads"), [(None, None), (None, 3), (2, 3)])
def test_from_block_mask(batch: int | None, heads: int | None, sizes: tuple[int, int]) -> None:
    mask = create_mask(sliding, batch, heads, *sizes, device="cpu")
    block_mask = create_block_mask(sliding, batch, heads, *sizes, device="cpu", BLOCK_SIZE=16)
    assert SparsePattern.from_block_mask(block_mask) == SparsePattern.from_mask(mask)
    if heads is None:
        pattern = SparsePattern.from_block_mask(block_mask, num_heads=4)
        assert pattern == SparsePattern.from_mask(mask, num_heads=4)
    else:
        with pytest.raises(ValueError, match=r"num_heads must be the mask's 3 \(got 4\)"):
            SparsePattern.from_block_mask(block_mask, num_heads=4)


def test_a_block_mask_with_the_mask_of_flex_attention() -> None:
    """The same output as FlexAttention's."""
    query, key, value = torch.randn(3, 2, 3, 64, 8).unbind(0)
    block_mask = create_block_mask(sliding, 2, 3, 64, 64, device="cpu", BLOCK_SIZE=16)
    output = SparsePattern.from_block_mask(block_mask).attend(query, key, value)
    torch.testing.assert_close(output, flex_attention(query, key, value, block_mask=block_mask))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: SparsePattern.from_window(2, 4, window_size=(-2, 0)),
            ValueError,
            r"window_size\[0\] must be at least -1",
        ),
        (
            lambda: SparsePattern.from_window(2, 4, window_size=(0, True)),
            ValueError,
            r"window_size\[1\] must be an integer",
        ),
        (lambda: SparsePattern.from_window(0, 4, window_size=(0, 0)), ValueError, r"num_heads must be at least 1"),
        (lambda: SparsePattern.from_window(1, 4, window_size=(0, 0), num_sinks=-1), ValueError, r"num_sinks must be"),
        (lambda: SparsePattern.from_blocks(torch.ones(2, 2, 2), (2, 2), 4), TypeError, r"blocks must be bool"),
        (
            lambda: SparsePattern.from_blocks(torch.ones(2, 2, 2, dtype=torch.bool), (2, 2), 5),
            ValueError,
            r"blocks must be \[heads, 3, 3\] or \[groups, heads, 3, 3\] \(got shape \(2, 2, 2\)\)",
        ),
        (
            lambda: SparsePattern.from_blocks(torch.ones(2, 2, 2, dtype=torch.bool), (0, 2), 4),
            ValueError,
            r"block_size\[0\] must be at least 1 \(got 0\)",
        ),
    ],
)
def test_wrong_windows_and_blocks_are_named(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# ---------------------------------------------------------------- costs


@pytest.mark.parametrize("num_sinks", [0, 4])
def test_causal_patterns_cost_what_they_hold(num_sinks: int) -> None:
    """Bytes of all tensors made while a pattern is built, set, cropped, compacted, reported and used."""

    def made(tokens: int) -> tuple[int, int, int]:
        with BytesMade() as counter:
            pattern = SparsePattern.from_window(2, tokens, window_size=(15, 0), num_sinks=num_sinks, is_causal=True)
            attention = PriorAttention(2, tokens, kind="softmax", is_causal=True)
            attention.set_pattern(pattern)
            pattern.density_per_head(), pattern.empty_rows(), pattern.empty_columns()
            pattern.crop(tokens - 1), pattern.rows(1, tokens), pattern.compact(), pattern.clone()
            query = torch.randn(1, 2, tokens, 4)
            attention(query, query, query)
            attention.load_state_dict(attention.state_dict())
            copy.deepcopy(attention), repr(attention)
            attention.compact()
        return counter.total, counter.largest, pattern.nnz

    sizes = [made(tokens) for tokens in (2048, 4096, 8192, 16384)]
    for (fewer, _, less), (more, largest, entries) in pairwise(sizes):
        assert more / fewer < 1.05 * entries / less
        assert largest < 20 * entries  # a mask of all pairs would be 1000 bytes an entry at the last size


@pytest.mark.parametrize(
    ("row", "column", "fits"), [(0, 0, True), (0, 1, False), (5, 5, True), (5, 6, False), (7, 6, True), (7, 7, True)]
)
def test_a_causal_module_refuses_what_is_above_the_diagonal(row: int, column: int, fits: bool) -> None:
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0].fill_diagonal_(True)
    mask[1, row, column] = True
    pattern = SparsePattern.from_mask(mask)
    assert pattern.is_causal == fits
    attention = PriorAttention(2, 8, is_causal=True)
    if fits:
        attention.set_pattern(pattern)
    else:
        with pytest.raises(ValueError, match="no pair above the diagonal"):
            attention.set_pattern(pattern)


# ---------------------------------------------------------------------------------------------------------------------
# Patterns that all heads share


@pytest.fixture(params=[(1, 4, 7, 9), (1, 2, 300, 17), (2, 3, 5, 5), (1, 3, 0, 4), (1, 2, 4, 0)], ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[SparsePattern, SparsePattern]:
    """A pattern stored once for all heads, and the same stored for each."""
    groups, heads, queries, keys = request.param
    mask = random_mask(groups, 1, queries, keys)
    return SparsePattern.from_mask(mask, num_heads=heads), SparsePattern.from_mask(mask.expand(-1, heads, -1, -1))


def test_a_shared_pattern_is_that_of_each_head(pair: tuple[SparsePattern, SparsePattern]) -> None:
    shared, own = pair
    assert shared.shared_heads == (shared.num_queries > 0)
    assert not own.shared_heads
    assert torch.equal(shared.to_mask(), own.to_mask())
    assert torch.equal(shared.density_per_head(), own.density_per_head())
    assert torch.equal(shared.empty_rows(), own.empty_rows())
    assert torch.equal(shared.empty_columns(), own.empty_columns())
    assert shared.density == own.density
    if shared.shared_heads:
        assert shared.nnz * shared.num_heads == own.nnz
        assert shared != own
        assert "shared_heads=True" in repr(shared)
    queries, keys = shared.num_queries // 2, shared.num_keys // 2
    for ours, theirs in (
        (shared.crop(queries, keys), own.crop(queries, keys)),
        (shared.rows(queries, shared.num_queries), own.rows(queries, own.num_queries)),
        (shared.clone(), own.clone()),
        (pickle.loads(pickle.dumps(shared)), own),
        (SparsePattern.from_state_dict(shared.state_dict()), own),
    ):
        assert torch.equal(ours.to_mask(), theirs.to_mask())
        assert ours.shared_heads == (ours.num_queries > 0)


def test_a_shared_pattern_costs_one_heads_memory() -> None:
    mask = random_mask(1, 1, 300, 200)
    one, shared = SparsePattern.from_mask(mask), SparsePattern.from_mask(mask, num_heads=12)
    assert shared.num_bytes == one.num_bytes
    assert shared.plan.nbytes == one.plan.nbytes
    assert shared.to_torch_csr().shape == (300, 200)
    query, key, value = (torch.randn(2, 12, n, 8) for n in (300, 200, 200))
    torch.testing.assert_close(
        shared.attend(query, key, value), SparsePattern.from_mask(mask.expand(-1, 12, -1, -1)).attend(query, key, value)
    )


@pytest.mark.parametrize(("groups", "heads", "key_heads"), [(1, 4, 4), (1, 4, 2), (1, 4, 1), (2, 3, 3), (2, 6, 3)])
def test_a_shared_pattern_attends_as_each_heads(groups: int, heads: int, key_heads: int) -> None:
    mask = random_mask(groups, 1, 6, 9, density=0.4)
    mask[..., 3] = False
    if groups % heads == 0:
        return
    shared, own = SparsePattern.from_mask(mask, heads), SparsePattern.from_mask(mask.expand(-1, heads, -1, -1))
    batch = 2 * groups
    query = torch.randn(batch, heads, 6, 5, dtype=torch.float64)
    key, value = (torch.randn(batch, key_heads, 9, 5, dtype=torch.float64) for _ in range(2))
    lens = torch.randint(10, (batch, key_heads))
    for kv_lens in (None, lens[:, 0], lens):
        torch.testing.assert_close(
            shared.attend(query, key, value, kv_lens=kv_lens), own.attend(query, key, value, kv_lens=kv_lens)
        )
        bias = torch.randn(1, 1, 6, 9, dtype=torch.float64)
        logs = [
            pattern.attend(query, key, value, pattern.entries(of_heads), kv_lens=kv_lens, log_prior=True)
            for pattern, of_heads in ((shared, bias), (own, bias.expand(-1, heads, -1, -1)))
        ]
        torch.testing.assert_close(*logs)
    compacted, keep = shared.compact(key_heads)
    theirs, their_keep = own.compact(key_heads)
    assert compacted.shared_heads
    assert torch.equal(keep, their_keep)
    assert torch.equal(compacted.to_mask(), theirs.to_mask())


def test_weights_of_a_shared_pattern() -> None:
    shared = SparsePattern.from_mask(random_mask(1, 1, 6, 9), num_heads=4)
    bias = torch.randn(1, 1, 6, 9, dtype=torch.float64, requires_grad=True)
    query, key, value = (torch.randn(2, 4, n, 5, dtype=torch.float64) for n in (6, 9, 9))
    ours = shared.attend(query, key, value, shared.entries(bias), log_prior=True)
    mask = torch.where(shared.to_mask(), bias, -torch.inf)
    theirs = torch.nan_to_num(torch.nn.functional.scaled_dot_product_attention(query, key, value, mask))
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(output.square().sum(), bias, retain_graph=True)[0] for output in (ours, theirs)]
    torch.testing.assert_close(grads[0], torch.nan_to_num(grads[1]))
    bias = torch.randn(1, 4, 6, 9)
    with pytest.raises(ValueError, match=r"the pattern's 1 heads \(got .*; SparsePattern.from_mask\(pattern.to_mask"):
        shared.entries(bias)
    own = SparsePattern.from_mask(shared.to_mask())  # as it says
    assert torch.equal(own.to_mask(), shared.to_mask())
    assert torch.equal(own.entries(bias), bias[own.to_mask()])


def test_shared_patterns_that_the_op_would_take_for_heads_are_refused() -> None:
    crow, col = torch.zeros(4 * 3 + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    for heads in (2, 4):
        with pytest.raises(ValueError, match=r"groups must not be a multiple of num_heads .* \(got 4 groups"):
            SparsePattern(crow, col, heads, 3, 5, groups=4)
    assert SparsePattern(crow, col, 3, 3, 5, groups=4).shared_heads


def test_sizes_are_looked_at_before_memory_is_taken() -> None:
    state = SparsePattern.from_mask(random_mask(1, 5, 7)).state_dict()
    wide = SparsePattern.from_state_dict({**state, "sizes": torch.tensor([1, 1, 5, 100_000_000])})
    assert wide.plan.nbytes < 4096
    for size in (2**31, 2**63 - 1):
        with pytest.raises(RuntimeError, match=r"csr_plan: num_keys must be at most 2147483647"):
            SparsePattern.from_state_dict({**state, "sizes": torch.tensor([1, 1, 5, size])})
