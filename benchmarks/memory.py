"""Peak memory of forward and backward with a learned prior, beyond the inputs: the op against SDPA with a bias.

Each is measured in a process of its own, because a peak never falls: ``python -m benchmarks.memory prior_attention``
prints bytes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fiak_ext  # noqa: F401 - registers torch.ops.fiak
from benchmarks import peers
from benchmarks.cases import Case

__all__ = ["MEMORY_CASE", "peak_bytes", "peak_memory", "peak_of"]

MEMORY_CASE = Case("memory", 16, 4, 4, 785, 785, 48, 48, is_causal=False, recorded="")

_SMALL = Case("small", 2, 2, 2, 17, 17, 48, 48, is_causal=False, recorded="")
_CALLS: dict[str, peers.Attention] = {
    "prior_attention": torch.ops.fiak.prior_attention,
    "sdpa float bias": peers.sdpa_float_bias(MEMORY_CASE),
    "eager exp * prior": peers.eager,
}


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status must have {field}")


def _inputs(case: Case) -> list[Tensor]:
    rows = [
        torch.randn(case.batch, case.queries, case.query_heads, case.head_dim).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]
    return [*rows, (torch.rand(1, case.query_heads, case.queries, case.keys) + 0.5).requires_grad_()]


def _measure(name: str) -> int:
    def train(inputs: list[Tensor], grad_output: Tensor) -> None:
        torch.autograd.grad(_CALLS[name](*inputs), inputs, grad_output)

    small, inputs = _inputs(_SMALL), _inputs(MEMORY_CASE)
    grad_output = torch.randn_like(inputs[0])
    train(small, torch.randn_like(small[0]))  # threads, code and scratch memory of the libraries
    return peak_of(lambda: train(inputs, grad_output))


def peak_of(call: Callable[[], object]) -> int:
    """Bytes of this process while ``call`` runs, at most, beyond those before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def peak_bytes(name: str, threads: int) -> int:
    """Bytes that forward and backward in float32 take at most, beyond the inputs and the output's gradient.

    Args:
        name: ``"prior_attention"``, ``"sdpa float bias"`` or ``"eager exp * prior"``.
        threads: torch's threads.

    Raises:
        subprocess.CalledProcessError: the measurement failed (it takes Linux's ``/proc``).
    """
    command = [sys.executable, "-m", "benchmarks.memory", name, str(threads)]
    root = Path(__file__).parents[1]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)


def peak_memory(threads: int) -> Iterator[dict[str, Any]]:
    """Yields ``contestant``, ``threads`` and ``bytes``; output and gradients, 48 MB, are part of each."""
    for name in _CALLS:
        yield {"contestant": name, "threads": threads, "bytes": peak_bytes(name, threads)}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(_measure(sys.argv[1]))
