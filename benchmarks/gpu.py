"""What gpu.sh measures: each op against other ways to compute the same, whole models, and what must hold beside.

Cells are measured one after another, the most important first: machine rates, the main masks of all cases in bfloat16,
checks, whole models, the same in float32, then all other masks. Contestants take turns, each after the L2 cache was
overwritten; a line has the quartiles of one contestant's calls in milliseconds, or its error. ``training`` is forward
and backward, with the gradients of query, key and value, and of bias or prior where there are any. With
``--device cpu`` the same cells run with small sizes; what is a GPU's own is named as left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear

from benchmarks import gpu_checks, models, peers
from benchmarks.cases import Case, make_mask
from benchmarks.records import LEFT, RESTART, Records
from benchmarks.timing import quartiles
from fiak_ext import SparsePattern, build_info

Call = Callable[..., Tensor]
Lines = list[dict[str, Any]]

CASES = [
    Case("deit_tiny_d48", 256, 4, 4, 197, 197, 48, 48, False, "vit_fashion_n197"),
    Case("deit_tiny_d64", 256, 4, 4, 197, 197, 64, 64, False, "vit_fashion_n197"),
    Case("deit_base", 64, 12, 12, 197, 197, 64, 64, False, "vit_fashion_n197"),
    Case("causal_2048", 8, 16, 16, 2048, 2048, 64, 64, True, "lm_kjv_n128"),
    Case("long_8192", 1, 16, 16, 8192, 8192, 128, 128, False, "vit_fashion_n197"),
    Case("long_4096", 1, 12, 12, 4096, 4096, 64, 64, False, "vit_fashion_n197"),
]
MASKS = [("dense", 0.0), ("recorded", 0.7)]
MORE_MASKS = [("uniform", 0.7), ("recorded", 0.9), ("recorded", 0.5), *(("uniform", x) for x in (0.9, 0.95, 0.5))]
MORE_CONTESTANTS = (
    "SDPA cuDNN",
    "SDPA flash",
    "SDPA efficient, boolean mask",
    "csr_attention",
    "csr_attention, prior",
    "FlexAttention",
)
MODELS = {
    "DeiT-tiny, 224 pixels": models.Sizes(256, 224, 16, 192, 12, 3),
    "ViT-small, 224 pixels": models.Sizes(256, 224, 16, 384, 12, 6),
    "DeiT-tiny, 512 pixels": models.Sizes(64, 512, 16, 192, 12, 3),
    "ViT-small, 512 pixels": models.Sizes(64, 512, 16, 384, 12, 6),
}
CONTESTANTS = ("unfused", "SDPA", f"FiAK {models.PRUNED:.0%} pruned", "FiAK dense")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
OURS = ("prior_attention", "csr_attention", "compact_", "FiAK")  # how names of contestants that must not fail begin
MOST_PAIRS = 600_000_000  # of a pattern: the host makes its plan
SECONDS = 1.0  # for the rounds of a cell


class BrokenContext(Exception):
    """All further calls of this process on the device would fail, whatever they are."""


class Clock:
    """Milliseconds of calls on a device, each after its caches were overwritten."""

    def __init__(self, device: str, records: Records) -> None:
        self.is_cuda, self.records = device == "cuda", records
        self.noise = torch.empty(2**28 if self.is_cuda else 2**20, dtype=torch.uint8, device=device)

    def time(self, call: Callable[[], object]) -> float:
        self.noise.zero_()
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)  # the device is busy until the call's kernels are launched
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def compare(self, key: str, calls: Mapping[str, Callable[[], object]]) -> Lines:
        """Interleaved calls, by name; the first that fails in a way that breaks the device is recorded at once."""
        known = self.records.done()
        lines: dict[str, dict[str, Any]] = {}
        times: dict[str, list[float]] = {}
        for name, call in calls.items():
            line = {"key": f"{key}|{name}", "contestant": name}
            lines[name] = known.get(line["key"], line)
            if "error" in lines[name]:  # of an earlier process, which it ended
                continue
            self.records.start(line["key"])
            lines[name] = line
            try:
                call()
                self.time(call)
                times[name] = []
            except Exception as error:
                line["error"] = describe(error)
                if name.startswith(OURS):
                    line.update(status="failed", why=line["error"])
                if self.is_broken():
                    self.records.add(line)
                    raise BrokenContext from error
        self.records.start(key)
        end = time.monotonic() + (SECONDS if self.is_cuda else 0.0)
        while times and (time.monotonic() < end or len(next(iter(times.values()))) < 3):
            for name, of in times.items():
                of.append(self.time(calls[name]))
        for name, of in times.items():
            lines[name].update(milliseconds=quartiles(of), calls=len(of))
        return list(lines.values())

    def is_broken(self) -> bool:
        """Whether the device has kept an error, which all calls after it give."""
        if not self.is_cuda:
            return False
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return True
        return False


def describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return text.splitlines()[0][:300]


@dataclass(frozen=True)
class Operands:
    """Of one attention case and mask, on the device."""

    case: Case
    mask: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    prior: Tensor  # [1, Hq, N, M], 0 where pruned
    pattern: SparsePattern | None  # None where it would have too many pairs
    plan: dict[str, Any]  # seconds and bytes of mask to pattern and plan

    @classmethod
    def make(cls, case: Case, dtype: torch.dtype, kind: str, pruned: float, device: str) -> Operands:
        generator = torch.Generator(device).manual_seed(0)

        def operand(heads: int, rows: int, columns: int) -> Tensor:
            x = torch.randn(case.batch, rows, heads, columns, generator=generator, device=device)
            return x.transpose(1, 2).to(dtype)

        if kind == "dense":
            mask = case.eligible(device).expand(case.query_heads, -1, -1)
        else:
            mask = make_mask(kind, case, pruned, generator)
        prior = torch.rand(mask.shape, generator=generator, device=device).add_(0.1).mul_(mask)[None]
        pairs = int(mask.sum())
        plan: dict[str, Any] = {"pairs": pairs, "density": pairs / mask.numel()}
        pattern = None
        if pairs <= MOST_PAIRS:
            start = time.perf_counter()
            pattern = SparsePattern.from_mask(mask)
            nnz = pattern.nnz  # waits
            middle = time.perf_counter()
            plan_bytes = pattern.plan.nbytes
            if device == "cuda":
                torch.cuda.synchronize()
            plan |= {"pattern_seconds": middle - start, "plan_seconds": time.perf_counter() - middle}
            plan |= {"pattern_bytes": pattern.num_bytes, "plan_bytes": plan_bytes, "nnz": nnz}
        sizes = (case.key_heads, case.keys)
        return cls(
            case,
            mask,
            operand(case.query_heads, case.queries, case.head_dim),
            operand(*sizes, case.head_dim),
            operand(*sizes, case.value_dim),
            operand(case.query_heads, case.queries, case.value_dim),
            prior,
            pattern,
            plan,
        )

    def weight(self, kind: str) -> Tensor:
        """``"bias"``, ``"prior"`` or ``"entries"``, the prior of the kept pairs: the same weights as ops take them."""
        if kind == "bias":
            return self.prior.log().to(self.query.dtype)
        if kind == "prior":
            return self.prior
        assert self.pattern is not None
        return self.pattern.entries(self.prior)

    def contestants(self, compiled: dict[str, Any]) -> dict[str, tuple[Call, str | None]]:
        """By name a call of query, key, value and, where there is one, of this kind of weight.

        Args:
            compiled: keeps what was compiled for this case and dtype from one mask to the next.
        """
        case, dtype = self.case, self.query.dtype

        def backend(which: SDPBackend, call: Call) -> Call:
            def run(*operands: Tensor) -> Tensor:
                with sdpa_kernel(which):
                    return call(*operands)

            return run

        def flex(backend: str | None) -> Call:
            found: list[Call] = []

            def run(*operands: Tensor) -> Tensor:
                if not found:  # here, so that its failing is this contestant's own
                    if compiled.get("of") != (case, dtype):
                        compiled.update(of=(case, dtype), call=peers.compiled_flex())
                    found.append(peers.flex(case, self.mask, compiled["call"], backend))
                return found[0](*operands)

            return run

        result: dict[str, tuple[Call, str | None]] = {}
        for name, which in BACKENDS.items():
            result[f"SDPA {name}"] = backend(which, peers.sdpa(case)), None
            result[f"SDPA {name}, boolean mask"] = backend(which, peers.sdpa_bool_mask(case, self.mask)), None
            result[f"SDPA {name}, float bias"] = backend(which, peers.sdpa_float_bias(case)), "bias"
        prior = partial(torch.ops.fiak.prior_attention, is_causal=case.is_causal)
        result["prior_attention, no prior"] = prior, None
        result["prior_attention"] = prior, "prior"
        if self.pattern is not None:
            result["csr_attention"] = self.pattern.attend, None
            result["csr_attention, prior"] = self.pattern.attend, "entries"
        result["FlexAttention"] = flex(None), None
        if self.query.is_cuda and dtype != torch.float32:
            result["FlexAttention, FLASH"] = flex("FLASH"), None
        return result

    def run(self, direction: str, call: Call, weight: Tensor | None) -> None:
        operands = [self.query, self.key, self.value, *([] if weight is None else [weight])]
        if direction == "forward":
            with torch.no_grad():
                call(*operands)
        else:
            leaves = [x.detach().requires_grad_() for x in operands]
            torch.autograd.grad(call(*leaves), leaves, self.grad)

    def floor(self, rates: Mapping[str, Any], direction: str) -> dict[str, float]:
        """Milliseconds if only the operands moved, each once, and if only the kept pairs were multiplied.

        Backward reads and writes the operands and their gradients, and multiplies five times where forward does twice.
        """
        case, dtype = self.case, self.query.dtype
        rows = case.batch * case.query_heads * case.queries * (case.head_dim + case.value_dim)
        rows += case.batch * case.key_heads * case.keys * (case.head_dim + case.value_dim)
        pairs = case.batch * float(self.plan["pairs"])
        operations = 2 * pairs * (case.head_dim + case.value_dim)
        moved, multiplied = (1.0, 1.0) if direction == "forward" else (1.0 + 2.0, 1.0 + 2.5)
        rate = rates[f"{str(dtype).removeprefix('torch.')}_operations_per_second"]
        return {
            "bytes_ms": 1e3 * moved * rows * dtype.itemsize / rates["bytes_per_second"],
            "operations_ms": 1e3 * multiplied * operations / rate,
        }


@dataclass(frozen=True)
class Cell:
    """What is measured at a time."""

    key: str
    run: Callable[[], Lines]


class Bench:
    """All cells of a device, in the order that they are wanted."""

    def __init__(self, device: str, records: Records) -> None:
        self.device, self.records, self.clock = device, records, Clock(device, records)
        self.cases = CASES if device == "cuda" else [_small(case) for case in CASES]
        self.models = MODELS if device == "cuda" else {name: _small_model(of) for name, of in MODELS.items()}
        self._operands: tuple[Any, Operands | None] = (None, None)
        self._compiled: dict[str, Any] = {}

    def cells(self) -> Iterator[Cell]:
        yield Cell("machine", self.machine)
        for dtype in DTYPES:
            for case in self.cases:
                for mask in MASKS:
                    yield from self._attention_cells(case, dtype, mask)
            yield from self._compact_cells(dtype)
            for op in gpu_checks.OPS:
                for check in gpu_checks.CHECKS:
                    yield Cell(f"check|{check}|{op}|{dtype}", partial(self.check, check, op, dtype))
            if dtype == "float32":
                for op in ("prior_attention", "csr_attention"):
                    yield Cell(f"check|65536 elements|{op}|{dtype}", partial(self.check, "65536 elements", op, dtype))
            for name in self.models:
                yield Cell(f"model|{name}|{dtype}", partial(self.model, f"model|{name}|{dtype}", name, dtype))
        for dtype in DTYPES:
            for case in self.cases:
                for mask in MORE_MASKS:
                    yield from self._attention_cells(case, dtype, mask)

    def machine(self) -> Lines:
        """What the device reaches: bytes a second of a copy, operations a second of a matrix product."""
        size = 8192 if self.clock.is_cuda else 256
        source = torch.empty(2**30 if self.clock.is_cuda else 2**20, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        [copy] = self.clock.compare("machine", {"copy": lambda: target.copy_(source)})
        rates = {"bytes_per_second": 2 * source.numel() / (1e-3 * copy["milliseconds"][1])}
        for name, dtype in DTYPES.items():
            x = torch.randn(size, size, device=self.device, dtype=dtype)
            [product] = self.clock.compare("machine", {"product": partial(torch.mm, x, x)})
            rates[f"{name}_operations_per_second"] = 2 * size**3 / (1e-3 * product["milliseconds"][1])
        name = torch.cuda.get_device_name() if self.clock.is_cuda else "cpu"
        return [
            {"key": "machine|rates", "device": name, "torch": str(torch.__version__), "build": build_info(), **rates}
        ]

    def _attention_cells(self, case: Case, dtype: str, mask: tuple[str, float]) -> Iterator[Cell]:
        key = f"attention|{case.name}|{dtype}|{mask[0]} {mask[1]:.0%}"
        yield Cell(f"{key}|plan", partial(self.plan, f"{key}|plan", case, dtype, mask))
        for direction in ("forward", "training"):
            run = partial(self.attention, f"{key}|{direction}", case, dtype, mask, direction)
            yield Cell(f"{key}|{direction}", run)

    def operands(self, case: Case, dtype: str, mask: tuple[str, float]) -> Operands:
        """Kept from one cell to the next."""
        wanted = (case, dtype, mask)
        if self._operands[0] != wanted or self._operands[1] is None:
            self._operands = (None, None)
            self._operands = (wanted, Operands.make(case, DTYPES[dtype], *mask, self.device))
        found = self._operands[1]
        assert found is not None
        return found

    def plan(self, key: str, case: Case, dtype: str, mask: tuple[str, float]) -> Lines:
        operands = self.operands(case, dtype, mask)
        line = {"key": f"{key}|pattern", "case": str(case), **operands.plan}
        if operands.pattern is None:
            line["left_out"] = f"csr_attention: the host would plan {operands.plan['pairs']} pairs"
        return [line]

    def attention(self, key: str, case: Case, dtype: str, mask: tuple[str, float], direction: str) -> Lines:
        operands = self.operands(case, dtype, mask)
        contestants = operands.contestants(self._compiled)
        names = [name for name in contestants if mask in MASKS or name in MORE_CONTESTANTS]
        kinds = dict.fromkeys(kind for name in names if (kind := contestants[name][1]) is not None)
        weights: dict[str | None, Tensor | None] = {None: None, **{kind: operands.weight(kind) for kind in kinds}}
        calls = {}
        for name in names:
            call, kind = contestants[name]
            calls[name] = partial(operands.run, direction, call, weights[kind])
        rates = self.records.results()["machine|rates"]
        floor = {"key": f"{key}|floor", "contestant": "floor", **operands.floor(rates, direction)}
        about = {"case": str(case), "dtype": dtype, "mask": f"{mask[0]} {mask[1]:.0%}", "direction": direction}
        return [{**about, **line} for line in [floor, *self.clock.compare(key, calls)]]

    def _compact_cells(self, dtype: str) -> Iterator[Cell]:
        for name, batch, heads, features in (("deit_tiny", 256, 3, 192), ("deit_base", 64, 12, 768)):
            for direction in ("forward", "training"):
                key = f"compact|{name}|{dtype}|{direction}"
                yield Cell(key, partial(self.compact, key, batch, heads, features, dtype, direction))

    def compact(self, key: str, batch: int, heads: int, features: int, dtype: str, direction: str) -> Lines:
        """30% of the keys stay: projected and gathered by the op, or all projected, then gathered."""
        rows, kept, size = 197, 59, 64
        if not self.clock.is_cuda:
            batch, features = 2, 24
        generator = torch.Generator(self.device).manual_seed(0)

        def randn(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=self.device).to(DTYPES[dtype])

        keep = torch.rand(heads, rows, generator=generator, device=self.device).argsort(1)[:, :kept].sort(1).values
        index = keep[None, :, :, None].expand(batch, -1, -1, size)
        x, weight, bias = randn(batch, rows, features), randn(heads * size, features), randn(heads * size)
        key_rows, value_rows = randn(batch, heads, rows, size), randn(batch, heads, rows, size)

        def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return linear(x, weight, bias).view(batch, rows, heads, size).transpose(1, 2).gather(2, index)

        def gather(key: Tensor, value: Tensor) -> list[Tensor]:
            return [key.gather(2, index), value.gather(2, index)]

        def run(call: Callable[..., Any], *operands: Tensor) -> None:
            if direction == "forward":
                with torch.no_grad():
                    call(*operands)
                return
            leaves = [x.detach().requires_grad_() for x in operands]
            outputs = call(*leaves)
            outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            torch.autograd.grad(outputs, leaves, [grad] * len(outputs))

        grad = randn(batch, heads, kept, size)
        projected, rows_of = (x, weight, bias), (key_rows, value_rows)
        calls = {
            "compact_linear": partial(run, partial(_with_keep, torch.ops.fiak.compact_linear, keep), *projected),
            "linear, gather": partial(run, project, *projected),
            "compact_kv": partial(run, partial(_with_keep, torch.ops.fiak.compact_kv, keep), *rows_of),
            "gather": partial(run, gather, *rows_of),
        }
        about = {"case": f"B{batch} H{heads} N{rows} to {kept}, {features} features", "dtype": dtype}
        return [{**about, "direction": direction, **line} for line in self.clock.compare(key, calls)]

    def check(self, check: str, op: str, dtype: str) -> Lines:
        line = {"key": f"check|{check}|{op}|{dtype}|result", "check": check, "op": op, "dtype": dtype}
        if check in gpu_checks.GPU_CHECKS and not self.clock.is_cuda:
            return [{**line, "left_out": "streams and graphs are a GPU's"}]
        gpu_checks.check(check, op, DTYPES[dtype], self.device)
        return [{**line, "holds": True}]

    def model(self, key: str, name: str, dtype: str) -> Lines:
        """Images a second of whole models without gradients."""
        sizes = self.models[name]
        built = models.build(sizes)
        images = torch.randn(sizes.batch, 3, sizes.image_size, sizes.image_size).to(self.device, DTYPES[dtype])
        moved = {name: built[name].to(self.device, DTYPES[dtype]) for name in CONTESTANTS}

        def call(name: str) -> None:
            with torch.no_grad():
                moved[name](images)

        lines = self.clock.compare(key, {name: partial(call, name) for name in CONTESTANTS})
        for line in lines:
            if "milliseconds" in line:
                line["images_per_second"] = sizes.batch / (1e-3 * statistics.median(line["milliseconds"]))
        return [{"model": name, "batch": sizes.batch, "dtype": dtype, **line} for line in lines]


def _with_keep(op: Callable[..., Any], keep: Tensor, *operands: Tensor) -> Any:
    return op(*operands, keep)


def _small(case: Case) -> Case:
    return replace(case, batch=2, query_heads=2, key_heads=2, queries=33, keys=33, head_dim=8, value_dim=8)


def _small_model(sizes: models.Sizes) -> models.Sizes:
    return replace(sizes, batch=2, image_size=64, dim=8 * sizes.num_heads, depth=2)


def calls() -> dict[str, tuple[Case, str]]:
    """What ncu looks at: training of the ops, recorded masks with 70% pruned, by key."""
    return {f"{case.name}|{op}": (case, op) for case in CASES[1:] for op in ("csr_attention", "prior_attention")}


def call_once(device: str, key: str) -> None:
    case, op = calls()[key]
    case = case if device == "cuda" else _small(case)
    operands = Operands.make(case, torch.bfloat16, "recorded", 0.7, device)
    call, kind = operands.contestants({})[op]
    operands.run("training", call, None if kind is None else operands.weight(kind))
    if device == "cuda":
        torch.cuda.synchronize()


def measure(device: str, records: Records) -> int:
    """Measures what has no result, as long as there is time; returns the exit status."""
    bench = Bench(device, records)
    cells = {cell.key: cell for cell in bench.cells()}
    for key in records.plan(cells):
        if records.is_over():
            return LEFT
        records.start(key)
        start = time.monotonic()
        try:
            lines = cells[key].run()
        except BrokenContext:
            return RESTART
        except Exception as error:
            records.add({"key": key, "status": "failed", "error": describe(error), "why": describe(error)})
            if bench.clock.is_broken():
                return RESTART
            continue
        seconds = round(time.monotonic() - start, 2)
        failed = any(line.get("status") == "failed" for line in lines)
        records.add(*lines, {"key": key, "status": "failed" if failed else "passed", "seconds": seconds})
        print(key, seconds, flush=True)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--list-calls", action="store_true", help="prints what --call takes")
    parser.add_argument("--call", help="calls an op once, for a profiler; without it all is measured, for gpu.sh")
    arguments = parser.parse_args()
    if arguments.list_calls:
        print("\n".join(calls()))
        return
    if missing := gpu_checks.what_is_missing(arguments.device):
        sys.exit(missing)
    if arguments.call:
        call_once(arguments.device, arguments.call)
    else:
        sys.exit(measure(arguments.device, Records.of_environment()))


if __name__ == "__main__":
    main()
