"""Times on a GPU: the ops against SDPA's backends, FlexAttention and the floor, and DeiT-tiny in images a second.

``python -m benchmarks.gpu`` takes about three minutes; --device cpu with small sizes goes through the same lines where
there is no GPU. What cannot run is named with its error, not left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import models, peers
from benchmarks.cases import Case, make_mask
from benchmarks.timing import quartiles
from fiak_ext import SparsePattern, build_info

PRUNED = 0.7
CASES = [
    Case("deit_tiny_paper", 256, 4, 4, 197, 197, 48, 48, False, "vit_fashion_n197"),
    Case("deit_tiny_timm", 256, 3, 3, 197, 197, 64, 64, False, "vit_fashion_n197"),
    Case("deit_base", 64, 12, 12, 197, 197, 64, 64, False, "vit_fashion_n197"),
    Case("causal_lm", 8, 16, 16, 2048, 2048, 64, 64, True, "lm_kjv_n128"),
]
MODEL = "DeiT-tiny, 4 heads of 48 (the paper's)"  # 508 images a second unfused, 649 with 70% pruned, in the paper
CONTESTANTS = ("unfused", "SDPA", f"FiAK {models.PRUNED:.0%} pruned", "FiAK dense")


class Clock:
    """Milliseconds of calls on a device, each after its caches were overwritten."""

    def __init__(self, device: str, small: bool) -> None:
        self.device = device
        self.noise = torch.empty(2**20 if small else 2**28, dtype=torch.uint8, device=device)

    def time(self, call: Callable[[], object]) -> float:
        self.noise.zero_()
        if self.device != "cuda":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def compare(self, calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Any]:
        """Quartiles of interleaved calls by name, after a call of each; or the error of those that fail."""
        results: dict[str, Any] = {}
        working = {}
        for name, call in calls.items():
            try:
                call()
                self.time(call)
                working[name] = call
            except Exception as error:
                results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        times: dict[str, list[float]] = {name: [] for name in working}
        end = time.monotonic() + seconds
        while working and (time.monotonic() < end or len(next(iter(times.values()))) < 3):
            for name, call in working.items():
                times[name].append(self.time(call))
        return {**results, **{name: {"milliseconds": quartiles(of), "calls": len(of)} for name, of in times.items()}}


def machine(clock: Clock, small: bool) -> dict[str, Any]:
    """The device and what it reaches: bytes a second of a copy, operations a second of a matrix product."""
    size = 512 if small else 8192
    source = torch.empty(2**20 if small else 2**30, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    rates: dict[str, Any] = {}
    copies = clock.compare({"copy": lambda: target.copy_(source)}, 0.5)["copy"]["milliseconds"]
    rates["bytes_per_second"] = 2 * source.numel() / (1e-3 * copies[1])
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(size, size, device=clock.device, dtype=dtype)
        product = clock.compare({"product": partial(torch.mm, x, x)}, 0.5)["product"]["milliseconds"]
        rates[f"{str(dtype).removeprefix('torch.')}_operations_per_second"] = 2 * size**3 / (1e-3 * product[1])
    is_cuda = clock.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "torch": torch.__version__,
        "fiak_ext": build_info(),
        **rates,
    }


def _floor(case: Case, dtype: torch.dtype, rates: Mapping[str, Any], density: float) -> dict[str, float]:
    """Milliseconds of forward if it only moved its operands once, and if it only multiplied the kept pairs."""
    rows = case.query_heads * case.queries * (case.head_size + case.value_size)
    rows += case.key_heads * case.keys * (case.head_size + case.value_size)
    pairs = case.batch * case.query_heads * case.queries * case.keys * density
    rate = rates[f"{str(dtype).removeprefix('torch.')}_operations_per_second"]
    return {
        "bytes_ms": 1e3 * case.batch * rows * dtype.itemsize / rates["bytes_per_second"],
        "operations_ms": 1e3 * 2 * pairs * (case.head_size + case.value_size) / rate,
    }


def attention(case: Case, dtype: torch.dtype, clock: Clock, rates: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Forward, and forward with backward, of everything that computes this case or its pruned version."""
    generator = torch.Generator().manual_seed(0)

    def operand(heads: int, rows: int, columns: int) -> Tensor:
        x = torch.randn(case.batch, rows, heads, columns, generator=generator).transpose(1, 2)
        return x.to(clock.device, dtype)

    query = operand(case.query_heads, case.queries, case.head_size)
    key, value = operand(case.key_heads, case.keys, case.head_size), operand(case.key_heads, case.keys, case.value_size)
    grad = operand(case.query_heads, case.queries, case.value_size)
    mask = make_mask("recorded", case, PRUNED, generator).to(clock.device)
    prior = (0.1 + torch.rand(mask.shape, generator=generator)).to(clock.device)[None]
    pattern = SparsePattern.from_mask(mask.cpu()).to(clock.device)

    def backend(which: SDPBackend) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(which):
                return scaled_dot_product_attention(q, k, v, is_causal=case.is_causal)

        return call

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not compiled:  # here, so that its failing is this contestant's own
            compiled.append(peers.flex(case, mask))
        return compiled[0](q, k, v)

    compiled: list[Callable[..., Tensor]] = []
    contestants: dict[str, Callable[..., Tensor]] = {
        "SDPA flash": backend(SDPBackend.FLASH_ATTENTION),
        "SDPA efficient": backend(SDPBackend.EFFICIENT_ATTENTION),
        "SDPA math": backend(SDPBackend.MATH),
        "SDPA, boolean mask": peers.sdpa_bool_mask(case, mask),
        "prior_attention": lambda q, k, v: torch.ops.fiak.prior_attention(q, k, v, prior, is_causal=case.is_causal),
        "prior_attention, no prior": lambda q, k, v: torch.ops.fiak.prior_attention(q, k, v, is_causal=case.is_causal),
        f"csr_attention, {PRUNED:.0%} pruned": pattern.attend,
    }

    if dtype == torch.float16:  # it takes half a minute to compile
        contestants[f"FlexAttention, {PRUNED:.0%} pruned"] = flex

    def training(call: Callable[..., Tensor]) -> None:
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        torch.autograd.grad(call(*leaves), leaves, grad)

    def inference(call: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            call(query, key, value)

    return {
        "case": str(case),
        "dtype": str(dtype).removeprefix("torch."),
        "density": float(mask.float().mean()),
        "floor": _floor(case, dtype, rates, 0.5 if case.is_causal else 1.0),
        "floor_pruned": _floor(case, dtype, rates, float(mask.float().mean())),
        "forward": clock.compare({name: partial(inference, call) for name, call in contestants.items()}, seconds),
        "training": clock.compare({name: partial(training, call) for name, call in contestants.items()}, seconds),
    }


def images_per_second(batch: int, dtype: torch.dtype, clock: Clock, seconds: float) -> dict[str, Any]:
    """Whole DeiT-tiny models without gradients."""
    sizes = models.MODELS[MODEL]
    built = models.build(sizes)
    images = torch.randn(batch, 3, sizes.image_size, sizes.image_size).to(clock.device, dtype)

    def call(name: str) -> None:
        with torch.no_grad():
            moved[name](images)

    moved, errors = {}, {}
    for name in CONTESTANTS:
        try:
            moved[name] = built[name].to(clock.device, dtype)
        except Exception as error:
            errors[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    results = {**errors, **clock.compare({name: partial(call, name) for name in moved}, seconds)}
    for result in results.values():
        if "milliseconds" in result:
            result["images_per_second"] = batch / (1e-3 * statistics.median(result["milliseconds"]))
    return {"model": MODEL, "batch": batch, "dtype": str(dtype).removeprefix("torch."), "results": results}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    rates = report["machine"]
    lines = [
        "# Times on a GPU",
        "",
        f"{rates['device']}; torch {rates['torch']}; copies reach {rates['bytes_per_second'] / 1e9:.0f} GB/s, float16 "
        f"products {rates['float16_operations_per_second'] / 1e12:.1f} TFLOP/s, float32 products "
        f"{rates['float32_operations_per_second'] / 1e12:.1f}. Milliseconds: median (quartiles) of interleaved calls.",
    ]

    def cell(result: Mapping[str, Any]) -> str:
        if "error" in result:
            return result["error"].replace("|", "/")[:80]
        low, median, high = result["milliseconds"]
        return f"{median:.3f} ({low:.3f} - {high:.3f})"

    for row in report["attention"]:
        lines += ["", f"## {row['case']}, {row['dtype']}", ""]
        for name, floor in (("dense", row["floor"]), ("pruned", row["floor_pruned"])):
            lines.append(
                f"Floor, {name}: {floor['bytes_ms']:.3f} by bytes, {floor['operations_ms']:.3f} by operations. "
            )
        lines += ["", "| | forward | forward and backward |", "|---|---|---|"]
        lines += [
            f"| {name} | {cell(row['forward'][name])} | {cell(row['training'][name])} |" for name in row["forward"]
        ]
    lines += ["", f"## {MODEL}, images a second", "", "| | batch | dtype | images/s |", "|---|---|---|---|"]
    for row in report["models"]:
        for name, result in row["results"].items():
            speed = f"{result['images_per_second']:.0f}" if "images_per_second" in result else cell(result)
            lines.append(f"| {name} | {row['batch']} | {row['dtype']} | {speed} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="one small case: to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("build/gpu.json"), help="and a .md beside it")
    arguments = parser.parse_args()
    clock = Clock(arguments.device, arguments.small)
    seconds = 0.0 if arguments.small else 2.0
    cases = [Case("small", 2, 2, 2, 17, 17, 8, 8, False, "vit_fashion_n197")] if arguments.small else CASES
    rates = machine(clock, arguments.small)
    report: dict[str, Any] = {"machine": rates, "attention": [], "models": []}
    for dtype in (torch.float16, torch.float32):
        for case in cases:
            report["attention"].append(attention(case, dtype, clock, rates, seconds))
        report["models"].append(images_per_second(2 if arguments.small else 256, dtype, clock, seconds))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
