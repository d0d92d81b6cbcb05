"""All ops on a CUDA device against the float64 reference on the CPU; skipped by name where there is no device.

``FIAK_TEST_DEVICE=cpu`` runs the same tests on the CPU, so that they are known to work before a device is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import (
    CSR_CASES,
    LARGE_CSR_CASES,
    LARGE_PRIOR_CASES,
    PRIOR_CASES,
    Case,
    Problem,
    assert_close_enough,
    random_case,
)
from torch import Tensor

from fiak_ext import SparsePattern, reference, which_kernel

DEVICE = os.environ.get("FIAK_TEST_DEVICE", "cuda")
LOW = (torch.float32, torch.bfloat16, torch.float16)
WIDE = [  # around the kernels' tiles of 64, and their widest heads
    Case("prior_attention", queries=n, keys=m, head_dim=d, value_dim=dv, is_causal=causal, kept=0.5)
    for n, m, d, dv, causal in [
        (1, 197, 64, 64, False),
        (64, 64, 64, 128, True),
        (65, 63, 256, 1, False),
        (128, 129, 200, 256, True),
    ]
]
WIDE += [replace(case, op="csr_attention", is_causal=False, weighted=True) for case in WIDE]
MANY = [  # more blocks than the second dimension of a grid may have
    Case("prior_attention", batch=8200, query_heads=8, key_heads=8, queries=2, keys=2),
    Case("csr_attention", batch=8200, query_heads=8, key_heads=8, queries=2, keys=2),
]


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("hardware: no CUDA device")


@contextmanager
def _never_synchronising() -> Iterator[None]:
    """An error where torch notices a synchronisation; what the kernels' launches do is not torch's."""
    if DEVICE != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _moved(tensor: Any) -> Any:
    """On the device, with the same strides where no element has two indices."""
    if not isinstance(tensor, Tensor):
        return tensor
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return tensor.to(DEVICE)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE).copy_(tensor)


@dataclass(frozen=True)
class OnDevice(Problem):
    """The op runs on the device, everything else on the CPU."""

    def forward(self, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        arguments = [_moved(tensor) for tensor in self.arguments(*tensors)]
        options = {name: _moved(option) for name, option in self.options.items()}
        with _never_synchronising():
            output, logsumexp = getattr(torch.ops.fiak, self.case.op + "_forward")(*arguments, **options)
        return output.cpu(), logsumexp.cpu()


def _on_device(case: Case, dtype: torch.dtype, seed: int = 0) -> OnDevice:
    """CUDA wants a plan."""
    case = replace(case, planned=case.op == "csr_attention")
    try:
        which_kernel(case.op, dtype, DEVICE)
    except ValueError as error:
        pytest.skip(str(error))
    return OnDevice(**vars(case.problem(dtype, seed)))


dtypes = pytest.mark.parametrize("dtype", LOW, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dtypes
@pytest.mark.parametrize("case", [*PRIOR_CASES, *CSR_CASES], ids=str)
def test_every_feature(case: Case, dtype: torch.dtype) -> None:
    assert_close_enough(_on_device(case, dtype))


@dtypes
@pytest.mark.parametrize("case", [*LARGE_PRIOR_CASES, *LARGE_CSR_CASES, *WIDE], ids=str)
def test_large_sizes(case: Case, dtype: torch.dtype) -> None:
    assert_close_enough(_on_device(case, dtype))


@pytest.mark.parametrize("op", ["prior_attention", "csr_attention"])
@pytest.mark.parametrize("seed", range(40))
def test_random_sizes(op: str, seed: int) -> None:
    assert_close_enough(_on_device(random_case(op, seed), LOW[seed % 3], seed))


@pytest.mark.parametrize("case", MANY, ids=str)
def test_more_heads_than_a_grid_dimension(case: Case) -> None:
    assert_close_enough(_on_device(case, torch.float32))


@dtypes
@pytest.mark.parametrize("case", [LARGE_PRIOR_CASES[0], LARGE_CSR_CASES[0]], ids=lambda case: case.op)
def test_the_same_bits_every_time(case: Case, dtype: torch.dtype) -> None:
    problem = _on_device(case, dtype)
    first, second = problem.run(), problem.run()
    for name, tensor in first.items():
        assert torch.equal(tensor, getattr(second, name)), name


@dtypes
@pytest.mark.parametrize("size", [(2, 3, 7, 4, 5, 6), (3, 2, 70, 65, 130, 64), (4, 12, 197, 60, 768, 64)], ids=str)
def test_compaction(size: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, rows, kept, features, columns = size
    generator = torch.Generator().manual_seed(0)
    keep = torch.full((heads, kept), -1)
    for h in range(heads):
        count = kept - h % 3
        keep[h, :count] = torch.randperm(rows, generator=generator)[:count].sort().values

    def compare(op: str, *inputs: Tensor) -> None:
        def results(call: Any, leaves: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
            outputs = call(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            matching = [x.to(output.dtype) for x, output in zip(directions, outputs, strict=True)]
            return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, matching)]

        def on_device(*leaves: Tensor) -> Any:
            arguments = [x.to(DEVICE) for x in (*leaves, keep)]
            with _never_synchronising():
                outputs = getattr(torch.ops.fiak, op)(*arguments)
            return tuple(x.cpu() for x in outputs) if isinstance(outputs, tuple) else outputs.cpu()

        def exactly(*leaves: Tensor) -> Any:
            return getattr(reference, op)(*leaves, keep)

        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        wide = [x.detach().double().requires_grad_() for x in leaves]
        positive = [x.detach().abs().requires_grad_() for x in wide]
        outputs = exactly(*wide)
        shapes = [x.shape for x in (outputs if isinstance(outputs, tuple) else (outputs,))]
        directions = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        exact = results(exactly, wide, directions)
        terms = results(exactly, positive, [x.abs() for x in directions])
        for x, wanted, sums in zip(results(on_device, leaves, directions), exact, terms, strict=True):
            assert x.dtype == dtype
            # Sums in float32, and one rounding to dtype.
            allowed = 4 * torch.finfo(torch.float32).eps * sums + torch.finfo(dtype).eps * wanted.abs()
            assert ((x.double() - wanted).abs() <= allowed).all()

    compare("compact_kv", *(torch.randn(batch, heads, rows, columns, generator=generator) for _ in range(2)))
    shapes = ((batch, rows, features), (heads * columns, features), (heads * columns,))
    compare("compact_linear", *(torch.randn(shape, generator=generator) for shape in shapes))


def test_streams_and_devices() -> None:
    """A call runs on the current stream, and on its tensors' device whichever one is current."""
    if DEVICE != "cuda":
        pytest.skip("hardware: streams are CUDA's")
    query, key, value = (torch.randn(4, 4, 197, 64, device=DEVICE) for _ in range(3))
    expected = torch.ops.fiak.prior_attention(query, key, value)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = query.clone()  # there only after the sleep
        actual = torch.ops.fiak.prior_attention(late, key, value)
    stream.synchronize()
    assert torch.equal(actual, expected)
    if torch.cuda.device_count() > 1:
        elsewhere = torch.ops.fiak.prior_attention(*(x.to("cuda:1") for x in (query, key, value)))
        assert torch.equal(elsewhere.cpu(), expected.cpu())


def test_a_cuda_graph_replays() -> None:
    if DEVICE != "cuda":
        pytest.skip("hardware: graphs are CUDA's")
    query, key, value = (torch.randn(2, 2, 70, 32, device=DEVICE) for _ in range(3))
    torch.ops.fiak.prior_attention(query, key, value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = torch.ops.fiak.prior_attention(query, key, value)
    query.copy_(torch.randn_like(query))
    graph.replay()
    assert torch.equal(output, torch.ops.fiak.prior_attention(query, key, value))


def test_what_cuda_does_not_do_is_refused() -> None:
    if DEVICE != "cuda":
        pytest.skip("hardware: limits are CUDA's")
    wide, tokens = torch.zeros(1, 1, 2, 257, device=DEVICE), torch.zeros(1, 2, 3, device=DEVICE).double()
    with pytest.raises(RuntimeError, match=r"prior_attention: query must have at most 256 columns on CUDA"):
        torch.ops.fiak.prior_attention(wide, wide, wide)
    with pytest.raises(RuntimeError, match=r"prior_attention: query must be torch.float32, .* \(got torch.float64\)"):
        torch.ops.fiak.prior_attention(*(tokens[None],) * 3)
    with pytest.raises(RuntimeError, match=r"compact_linear: input must be torch.float32, .* \(got torch.float64\)"):
        keep = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
        torch.ops.fiak.compact_linear(tokens, tokens[0], None, keep)


def test_patterns_move_to_the_device() -> None:
    _on_device(CSR_CASES[0], torch.float32)  # skips where there is no kernel
    pattern = SparsePattern.from_mask(torch.rand(3, 50, 50, generator=torch.Generator().manual_seed(0)) < 0.3)
    query, key, value = (torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    actual = pattern.to(DEVICE).attend(*(x.to(DEVICE) for x in (query, key, value))).cpu()
    torch.testing.assert_close(actual, pattern.attend(query, key, value))
