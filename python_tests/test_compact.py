"""fiak::compact_kv and fiak::compact_linear."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import DTYPES, cpu_isa, error, isas_of, num_threads
from torch import Tensor

from fiak_ext import reference

compact_kv = torch.ops.fiak.compact_kv
compact_linear = torch.ops.fiak.compact_linear

# batch, heads, rows, kept, in_features, head_dim; the values of compact_kv have head_dim + 1 columns
SIZES = [
    (2, 3, 7, 4, 5, 6),
    (1, 1, 1, 1, 1, 1),
    (3, 2, 40, 33, 17, 16),
    (2, 4, 50, 50, 192, 48),
    (2, 2, 9, 5, 130, 129),
    (1, 3, 20, 0, 8, 8),
    (2, 2, 0, 3, 8, 8),
    (0, 2, 5, 3, 8, 8),
    (2, 0, 5, 3, 8, 8),
    (2, 2, 5, 3, 0, 8),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _keep(heads: int, rows: int, kept: int) -> Tensor:
    """Ascending rows, a different number for every head, padded with -1."""
    keep = torch.full((heads, kept), -1)
    for h in range(heads):
        count = max(min(rows, kept) - h, 0)
        keep[h, :count] = torch.randperm(rows, generator=_generator().manual_seed(h))[:count].sort().values
    return keep


def _kv(size: tuple[int, ...], dtype: torch.dtype, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, kept, _, columns = size
    generator = _generator()
    key, value = (
        torch.randn(batch, rows, heads, c, generator=generator).to(dtype).transpose(1, 2).requires_grad_(requires_grad)
        for c in (columns, columns + 1)
    )
    return key, value, _keep(heads, rows, kept)


def _linear(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, rows, kept, features, columns = size
    generator = _generator()
    tokens, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((batch, rows, features), (heads * columns, features), (heads * columns,))
    )
    return tokens, weight, bias, _keep(heads, rows, kept)


@sizes
@dtypes
def test_compact_kv_copies_and_scatters(size: tuple[int, ...], dtype: torch.dtype) -> None:
    key, value, keep = _kv(size, dtype, requires_grad=True)
    actual, exact = compact_kv(key, value, keep), reference.compact_kv(key, value, keep)
    for x, y in zip(actual, exact, strict=True):
        assert torch.equal(x, y.to(dtype))
    directions = [torch.randn(x.shape, generator=_generator()).to(dtype) for x in actual]
    ours = torch.autograd.grad(actual, (key, value), directions)
    theirs = torch.autograd.grad(exact, (key, value), [x.double() for x in directions])
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y.to(dtype))


def _linear_results(op: Any, arguments: Sequence[Tensor | None], direction: Tensor) -> list[Tensor]:
    """Output and gradients."""
    inputs = [x for x in arguments[:3] if x is not None]
    output = op(*arguments)
    return [output.detach(), *torch.autograd.grad(output, inputs, direction.to(output.dtype))]


@sizes
@dtypes
@pytest.mark.parametrize("has_bias", [True, False])
def test_compact_linear_against_the_reference(size: tuple[int, ...], dtype: torch.dtype, has_bias: bool) -> None:
    tokens, weight, bias, keep = _linear(size, dtype)
    arguments = (tokens, weight, bias if has_bias else None, keep)
    direction = torch.randn(reference.compact_linear(*arguments).shape, generator=_generator()).to(dtype)
    exact = _linear_results(reference.compact_linear, arguments, direction)
    absolute = [None if x is None else x.detach().abs().requires_grad_() for x in arguments[:3]]
    terms = _linear_results(reference.compact_linear, (*absolute, keep), direction.abs())
    for isa in isas_of(dtype):
        with cpu_isa(isa):
            actual = _linear_results(compact_linear, arguments, direction)
        for x, wanted, sums in zip(actual, exact, terms, strict=True):
            assert x.shape == wanted.shape
            assert x.dtype == dtype
            # Sums in float32 (float64), and one rounding to dtype.
            accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            allowed = 4 * accumulated * sums + torch.finfo(dtype).eps * wanted.abs()
            assert ((x.double() - wanted).abs() <= allowed).all()


def test_gradcheck() -> None:
    key, value, keep = _kv(SIZES[0], torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k, v: compact_kv(k, v, keep), (key, value))
    tokens, weight, bias, keep = _linear(SIZES[0], torch.float64)
    assert torch.autograd.gradcheck(lambda x, w, b: compact_linear(x, w, b, keep), (tokens, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w: compact_linear(x, w, None, keep), (tokens, weight))


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)), ids=str)
def test_every_requires_grad_subset(wanted: tuple[bool, ...]) -> None:
    *inputs, keep = _linear(SIZES[2], torch.float32)
    full = torch.autograd.grad(compact_linear(*inputs, keep).square().sum(), inputs)
    some = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    output = compact_linear(*some, keep)
    assert output.requires_grad == any(wanted)
    if any(wanted):
        output.square().sum().backward()
    for leaf, grad, want in zip(some, full, wanted, strict=True):
        assert (leaf.grad is not None) == want
        assert leaf.grad is None or torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)], ids=str)
def test_keys_or_values_alone(wanted: tuple[bool, bool], used: tuple[bool, bool]) -> None:
    *inputs, keep = _kv(SIZES[2], torch.float32)
    for leaf, want in zip(inputs, wanted, strict=True):
        leaf.requires_grad_(want)
    kept = compact_kv(*inputs, keep)
    assert tuple(x.requires_grad for x in kept) == wanted
    for x, want, use in zip(kept, wanted, used, strict=True):
        if want and use:
            x.sum().backward(retain_graph=True)
    for leaf, want, use in zip(inputs, wanted, used, strict=True):
        assert (leaf.grad is not None) == (want and use)


def test_opcheck() -> None:
    for size in SIZES[:2]:
        key, value, keep = _kv(size, torch.float32, requires_grad=True)
        torch.library.opcheck(compact_kv.default, (key, value, keep))
        kept = [x.detach() for x in compact_kv(key, value, keep)]
        backward = torch.ops.fiak.compact_kv_backward.default
        for grads in (kept, (None, kept[1]), (kept[0], None)):
            torch.library.opcheck(backward, (*grads, keep, key.shape[2]))
        tokens, weight, bias, keep = _linear(size, torch.float32)
        torch.library.opcheck(compact_linear.default, (tokens, weight, bias, keep))
        torch.library.opcheck(compact_linear.default, (tokens, weight, None, keep))
        tensors = [x.detach() for x in (compact_linear(tokens, weight, bias, keep), tokens, weight)]
        for mask in ([True, True, True], [False, True, False]):
            torch.library.opcheck(torch.ops.fiak.compact_linear_backward.default, (*tensors, keep, mask))


@dtypes
def test_layouts_and_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    key, value, keep = _kv(SIZES[2], dtype)
    tokens, weight, bias, _ = (x.detach() for x in _linear(SIZES[2], dtype))

    def strided(x: Tensor) -> Tensor:  # columns too
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]

    def results(tokens: Tensor, weight: Tensor, bias: Tensor, direction: Tensor) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in (tokens, weight, bias)]
        output = compact_linear(*leaves, keep)
        return [output, *torch.autograd.grad(output, leaves, direction)]

    direction = torch.randn(compact_linear(tokens, weight, bias, keep).shape, generator=_generator()).to(dtype)
    for isa in isas_of(dtype):
        with cpu_isa(isa):
            with num_threads(1):
                expected = [*compact_kv(key, value, keep), *results(tokens, weight, bias, direction)]
            for threads in (2, 3):
                with num_threads(threads):
                    again = [
                        *compact_kv(strided(key), strided(value), strided(keep)),
                        *results(*(strided(x.detach()) for x in (tokens, weight, bias, direction))),
                    ]
                for x, y in zip(again, expected, strict=True):
                    assert torch.equal(x, y)


def test_double_backward_is_refused_by_name() -> None:
    *inputs, keep = _linear(SIZES[0], torch.float64)
    (grad,) = torch.autograd.grad(compact_linear(*inputs, keep).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="fiak::compact_linear_backward is not implemented"):
        grad.sum().backward()
    key, value, keep = _kv(SIZES[0], torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(compact_kv(key, value, keep)[0].square().sum(), key, create_graph=True)
    with pytest.raises(RuntimeError, match="fiak::compact_kv_backward is not implemented"):
        grad.sum().backward()


def test_autocast() -> None:
    *inputs, keep = _linear(SIZES[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = compact_linear(*inputs, keep)
        key, value, keep = _kv(SIZES[0], torch.float32)
        assert compact_kv(key, value, keep)[0].dtype == torch.float32
    assert torch.equal(output, compact_linear(*(x.bfloat16() for x in inputs), keep))
    output.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in inputs)


def test_nan_in_a_row_that_is_not_kept_changes_nothing() -> None:
    keep = torch.tensor([[0, 2, -1], [0, 3, 4]])
    key, value, _ = _kv((2, 2, 6, 3, 5, 4), torch.float32)
    tokens, weight, bias, _ = (x.detach() for x in _linear((2, 2, 6, 3, 5, 4), torch.float32))
    for isa in isas_of(torch.float32):
        with cpu_isa(isa):
            results = []
            for content in (0.0, torch.nan):
                key[:, 0, 3], tokens[:, 1], tokens[:, 5] = content, content, content
                leaves = [x.clone().requires_grad_() for x in (tokens, weight, bias)]
                output = compact_linear(*leaves, keep)
                results.append([compact_kv(key, value, keep)[0], output, *torch.autograd.grad(output.sum(), leaves)])
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


KEY = torch.zeros(2, 2, 5, 3)
KEEP = torch.tensor([[0, 2], [1, -1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 2, 5)}, r"key must have the shape \[B, H, M, D\] \(got \[2, 2, 5\]\)"),
        ({"value": torch.zeros(2)}, r"value must have the shape \[B, H, M, Dv\] \(got \[2\]\)"),
        ({"key": KEY.int()}, r"key must be .*torch.float16 \(got torch.int32\)"),
        ({"value": KEY.half()}, r"value must have the dtype of key, torch.float32 \(got torch.float16\)"),
        ({"value": torch.zeros(1, 2, 5, 3)}, r"value must have size 2 in dimension 0, key's batch \(got"),
        ({"value": torch.zeros(2, 1, 5, 3)}, r"value must have size 2 in dimension 1, key's heads \(got"),
        ({"value": torch.zeros(2, 2, 4, 3)}, r"value must have size 5 in dimension 2, key's rows \(got"),
        ({"keep": KEEP.int()}, r"keep must be torch.int64 \(got torch.int32\)"),
        ({"keep": KEEP[0]}, r"keep must have the shape \[H, K\] \(got \[2\]\)"),
        ({"keep": KEEP[:1]}, r"keep must have size 2 in dimension 0, key's heads \(got \[1, 2\]\)"),
        ({"keep": torch.tensor([[0, 5], [0, 1]])}, r"keep must lie in -1..M - 1 = 4 \(got 5 for head 0\)"),
        ({"keep": torch.tensor([[0, 1], [-2, 1]])}, r"keep must lie in -1..M - 1 = 4 \(got -2 for head 1\)"),
        ({"keep": torch.tensor([[0, 1], [2, 1]])}, r"keep must ascend in each row.*\(got 1 after 2 for head 1\)"),
        ({"keep": torch.tensor([[3, 3], [0, 1]])}, r"keep must ascend in each row.*\(got 3 after 3 for head 0\)"),
        ({"keep": torch.tensor([[-1, 3], [0, 1]])}, r"keep must ascend in each row.*\(got 3 after -1 for head 0\)"),
    ],
    ids=str,
)
def test_malformed_compact_kv(change: dict[str, Any], message: str) -> None:
    arguments = {"key": KEY, "value": KEY, "keep": KEEP}
    compact_kv(**arguments)
    with pytest.raises(RuntimeError, match=f"^compact_kv: {message}"):
        compact_kv(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(5, 3)}, r"input must have the shape \[B, M, Dx\] \(got \[5, 3\]\)"),
        ({"weight": torch.zeros(8)}, r"weight must have the shape \[H \* D, Dx\] \(got \[8\]\)"),
        ({"weight": torch.zeros(8, 4)}, r"weight must have size 3 in dimension 1, input's features \(got \[8, 4\]\)"),
        ({"weight": torch.zeros(7, 3), "bias": None}, r"weight must have a multiple of keep's 2 rows \(got 7\)"),
        (
            {"weight": torch.zeros(8, 3).half()},
            r"weight must have the dtype of input, torch.float32 \(got torch.float16\)",
        ),
        ({"input": torch.zeros(2, 5, 3).long()}, r"input must be .*torch.float16 \(got torch.int64\)"),
        ({"bias": torch.zeros(7)}, r"bias must have size 8 in dimension 0, weight's rows \(got \[7\]\)"),
        ({"bias": torch.zeros(8, 1)}, r"bias must have the shape \[H \* D\] \(got \[8, 1\]\)"),
        ({"bias": torch.zeros(8).double()}, r"bias must have the dtype of input, torch.float32 \(got torch.float64\)"),
        ({"keep": KEEP.float()}, r"keep must be torch.int64 \(got torch.float32\)"),
        ({"keep": torch.tensor([[0, 5], [0, 1]])}, r"keep must lie in -1..M - 1 = 4 \(got 5 for head 0\)"),
    ],
    ids=str,
)
def test_malformed_compact_linear(change: dict[str, Any], message: str) -> None:
    arguments = {"input": torch.zeros(2, 5, 3), "weight": torch.zeros(8, 3), "bias": torch.zeros(8), "keep": KEEP}
    output = compact_linear(**arguments)
    with pytest.raises(RuntimeError, match=f"^compact_linear: {message}"):
        compact_linear(**{**arguments, **change})
    if "bias" not in message[:4]:
        backward = {**arguments, **change, "grad_output": output, "output_mask": [True] * 3}
        del backward["bias"]
        with pytest.raises(RuntimeError, match=f"^compact_linear_backward: {message}"):
            torch.ops.fiak.compact_linear_backward(**backward)


@pytest.mark.parametrize(
    ("grad_output", "message"),
    [
        (torch.zeros(2, 2, 2), r"grad_output must have the shape \[B, H, K, D\] \(got \[2, 2, 2\]\)"),
        (torch.zeros(1, 2, 2, 4), r"grad_output must have size 2 in dimension 0, input's batch \(got"),
        (torch.zeros(2, 1, 2, 4), r"grad_output must have size 2 in dimension 1, keep's heads \(got"),
        (torch.zeros(2, 2, 3, 4), r"grad_output must have size 2 in dimension 2, keep's columns \(got"),
        (torch.zeros(2, 2, 2, 3), r"grad_output must have H \* D = 8 \(got \[2, 2, 2, 3\]\)"),
        (torch.zeros(2, 2, 2, 4).half(), r"grad_output must have the dtype of input"),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, Tensor) else "",
)
def test_malformed_grad_output(grad_output: Tensor, message: str) -> None:
    arguments = (torch.zeros(2, 5, 3), torch.zeros(8, 3), KEEP, [True] * 3)
    with pytest.raises(RuntimeError, match=f"^compact_linear_backward: {message}"):
        torch.ops.fiak.compact_linear_backward(grad_output, *arguments)


@pytest.mark.parametrize("isa", isas_of(torch.float32))
@pytest.mark.parametrize("shift", [0.0, 1.0])  # gradients that cancel, and that add up
@pytest.mark.parametrize(("batch", "rows"), [(512, 200), (1, 102400), (100, 577)])
def test_gradients_over_many_rows_are_as_exact_as_torchs(isa: str, shift: float, batch: int, rows: int) -> None:
    generator = _generator()
    x = torch.randn(batch, rows, 16, generator=generator) + shift
    weight, bias = torch.randn(8, 16, generator=generator), torch.randn(8, generator=generator)
    grad = torch.randn(batch, rows, 8, generator=generator) + shift
    exact = [torch.einsum("bnd,bnx->dx", grad.double(), x.double()), grad.double().sum((0, 1))]
    leaves = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    theirs = torch.autograd.grad(torch.nn.functional.linear(x, *leaves), leaves, grad)
    with cpu_isa(isa):
        _, *ours = torch.ops.fiak.compact_linear_backward(
            grad[:, None], x, weight, torch.arange(rows)[None], [False, True, True]
        )
    for actual, torchs, expected in zip(ours, theirs, exact, strict=True):
        rounding = 4 * torch.finfo(torch.float32).eps * float(expected.abs().max())
        assert error(actual, expected) <= 3 * error(torchs, expected) + rounding


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_key": torch.zeros(2, 2, 2)}, r"grad_key must have the shape \[B, H, K, \*\] \(got \[2, 2, 2\]\)"),
        ({"grad_value": torch.zeros(2, 3, 2, 4)}, r"grad_value must have size 2 in dimension 1, keep's heads \(got"),
        ({"grad_key": torch.zeros(2, 2, 3, 4)}, r"grad_key must have size 2 in dimension 2, keep's columns \(got"),
        ({"grad_key": torch.zeros(2, 2, 2, 4).int()}, r"grad_key must be .*torch.float16 \(got torch.int32\)"),
        ({"num_keys": -1}, r"num_keys must not be negative \(got -1\)"),
        ({"num_keys": 2}, r"keep must lie in -1..M - 1 = 1 \(got 2 for head 0\)"),
    ],
    ids=str,
)
def test_malformed_compact_kv_backward(change: dict[str, Any], message: str) -> None:
    grad = torch.zeros(2, 2, 2, 4)
    arguments = {"grad_key": grad, "grad_value": grad, "keep": KEEP, "num_keys": 5}
    torch.ops.fiak.compact_kv_backward(**arguments)
    with pytest.raises(RuntimeError, match=f"^compact_kv_backward: {message}"):
        torch.ops.fiak.compact_kv_backward(**{**arguments, **change})


def test_devices_without_kernels_are_named() -> None:
    for call in (
        lambda: compact_kv(KEY.to_sparse(), KEY, KEEP),
        lambda: compact_linear(KEY[0].to_sparse(), KEY[0, 0], None, KEEP),
    ):
        with pytest.raises(NotImplementedError, match=r"fiak::compact_.*: has kernels for strided CPU tensors only"):
            call()
