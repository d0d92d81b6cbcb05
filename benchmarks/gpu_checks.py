"""What must hold of the ops on a GPU beside their results: no waits, CUDA graphs, many elements, empty rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import peers
from fiak_ext import SparsePattern, build_info

__all__ = ["CHECKS", "GPU_CHECKS", "OPS", "check", "what_is_missing"]

OPS = (
    "prior_attention",
    "prior_attention, no prior",
    "csr_attention",
    "csr_attention, prior",
    "compact_kv",
    "compact_linear",
)
GPU_CHECKS = ("waits", "graph")
CHECKS = (*GPU_CHECKS, "empty rows")

_BATCH, _HEADS, _TOKENS, _SIZE = 4, 4, 197, 48


def what_is_missing(device: str) -> str:
    """Why nothing can run on a device; empty if it can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device; --device cpu goes through the same on the CPU"
    if device == "cuda" and build_info()["cuda"] is None:
        return "the compiled library has no CUDA kernels; build it with benchmarks/gpu.sh build"
    return ""


def check(name: str, op: str, dtype: torch.dtype, device: str) -> None:
    """Raises what goes wrong.

    Args:
        name: ``"waits"``: forward and backward make the host wait for nothing once there is a plan. ``"graph"``: both
            are captured, and their replay gives the same bits for other numbers. ``"empty rows"``: where memory is full
            of NaN, rows without keys become 0 and all else finite. ``"65536 elements"``: attention of a batch of
            65,536 with two heads, more blocks than a dimension of a grid may have, is that of single operations.
        op: one of :data:`OPS`.
    """
    if name == "65536 elements":
        _check_many(op, device)
        return
    call, leaves = _problem(op, dtype, device)
    _run(call, leaves)
    {"waits": _check_waits, "graph": _check_graph, "empty rows": _check_empty_rows}[name](call, leaves)


def _problem(op: str, dtype: torch.dtype, device: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A call that returns one tensor, and what it is called with; every third query keeps no key."""
    generator = torch.Generator().manual_seed(0)

    def randn(*sizes: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device, of).requires_grad_()

    if op.startswith("compact"):
        keep = torch.stack([torch.randperm(_TOKENS, generator=generator)[:60].sort().values for _ in range(_HEADS)])
        keep[:, 57:] = -1
        keep = keep.to(device)
        if op == "compact_kv":
            rows = [randn(_BATCH, _HEADS, _TOKENS, _SIZE) for _ in range(2)]
            return lambda key, value: torch.cat(torch.ops.fiak.compact_kv(key, value, keep), 3), rows
        operands = [randn(_BATCH, _TOKENS, 192), randn(_HEADS * _SIZE, 192), randn(_HEADS * _SIZE)]
        return lambda x, weight, bias: torch.ops.fiak.compact_linear(x, weight, bias, keep), operands
    operands = [randn(_BATCH, _HEADS, _TOKENS, _SIZE) for _ in range(3)]
    mask = torch.rand(_HEADS, _TOKENS, _TOKENS, generator=generator) < 0.3
    mask[:, ::3] = False
    if op == "prior_attention, no prior":
        return torch.ops.fiak.prior_attention, operands
    if op == "prior_attention":
        prior = torch.rand(1, *mask.shape, generator=generator) * mask
        return torch.ops.fiak.prior_attention, [*operands, prior.to(device).requires_grad_()]
    pattern = SparsePattern.from_mask(mask).to(device)
    if op == "csr_attention":
        return pattern.attend, operands
    values = (0.5 + torch.rand(pattern.nnz, generator=generator)).to(device).requires_grad_()
    return pattern.attend, [*operands, values]


def _run(call: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The output and all gradients."""
    output = call(*leaves)
    return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]


def _check_waits(call: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run(call, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _check_graph(call: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _run(call, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _run(call, leaves)
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    graph.replay()
    for replayed, expected in zip(captured, _run(call, leaves), strict=True):
        assert torch.equal(replayed, expected), "the replay gives other bits"


def _check_empty_rows(call: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    expected = _run(call, leaves)
    empty = (expected[0] == 0).all(3)
    del expected[0]
    poison = [torch.full_like(x, torch.nan) for x in [*leaves, *expected] for _ in range(8)]
    poison.append(torch.full((2**24,), torch.nan, device=leaves[0].device))
    del poison, expected  # which gives all this memory to the next tensors
    output, *grads = _run(call, leaves)
    assert torch.equal((output == 0).all(3), empty), "rows without keys are not 0"
    assert all(x.isfinite().all() for x in (output, *grads)), "there is NaN where memory had NaN"


def _check_many(op: str, device: str) -> None:
    batch = 65_536 if device == "cuda" else 512
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(batch, 2, 4, 8, generator=generator).to(device).requires_grad_() for _ in range(3)]
    mask = torch.rand(2, 4, 4, generator=generator).lt(0.6).to(device)
    mask[..., 0] = True
    prior = mask.float()[None]
    pattern = SparsePattern.from_mask(mask)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if op == "csr_attention":
            return pattern.attend(query, key, value)
        output: Tensor = torch.ops.fiak.prior_attention(query, key, value, prior)
        return output

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return peers.eager(query, key, value, prior)

    for actual, expected in zip(_run(ours, leaves), _run(theirs, leaves), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
