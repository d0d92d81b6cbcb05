"""The one table of cases that the tests of the attention ops run through, and what a test does with a case."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fiak_ext import _C, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "strided columns")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; :meth:`problem` draws its tensors."""

    op: str  # prior_attention or csr_attention
    batch: int = 2
    query_heads: int = 2
    key_heads: int = 2
    queries: int = 4
    keys: int = 5
    head_dim: int = 3
    value_dim: int = 2
    layouts: tuple[str, str, str] = ("contiguous",) * 3
    score: str = "dot"
    scale: float | None = None
    kv_lens: bool = False
    dropout_p: float = 0.0
    groups: int = 1
    kept: float = 0.6  # share of the pairs in the support
    log_prior: bool = False
    # prior_attention
    prior: str | None = "GHNM"  # its shape, with 1 for a broadcast dimension
    is_causal: bool = False
    # csr_attention
    weighted: bool = False  # each pair has a weight of its own
    index_dtype: torch.dtype = torch.int64
    planned: bool = False
    more_rows: int = 0  # rows of the pattern beyond the queries, which have random offsets then
    more_keys: int = 0  # columns of the pattern beyond the keys
    shared_pattern: bool = False  # by all query heads; where their number divides the groups, each has its own

    def __str__(self) -> str:
        changed = {name: value for name, value in vars(self).items() if value != getattr(Case(self.op), name)}
        return ",".join(f"{name}={value}" for name, value in changed.items()).replace(" ", "") or "default"

    def problem(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
        """Random tensors of these sizes. ``seed`` also decides which pairs are in the support."""
        generator = torch.Generator().manual_seed(seed)
        sizes = (self.batch, self.query_heads, self.queries, self.head_dim)
        query = _laid_out(sizes, self.layouts[0], dtype, generator)
        key_sizes = (self.batch, self.key_heads, self.keys)
        key = _laid_out((*key_sizes, self.head_dim), self.layouts[1], dtype, generator)
        value = _laid_out((*key_sizes, self.value_dim), self.layouts[2], dtype, generator)
        options: dict[str, Any] = {"score": self.score, "scale": self.scale, "dropout_p": self.dropout_p}
        options["log_prior"] = self.log_prior
        if self.dropout_p > 0:
            options["seed"] = torch.randint(2**62, (1,), generator=generator)
        if self.kv_lens:
            options["kv_lens"] = torch.randint(self.keys + 1, (self.batch,), generator=generator)
        weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        draw = self._prior if self.op == "prior_attention" else self._pattern
        weight, indices, more = draw(weight_dtype, generator)
        return Problem(self, (query, key, value, weight), indices, {**options, **more})

    def _prior(self, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor | None, tuple[()], dict[str, Any]]:
        options = {"is_causal": self.is_causal}
        if self.prior is None:
            return None, (), options
        sizes = {"G": self.groups, "H": self.query_heads, "N": self.queries, "M": self.keys, "1": 1}
        weight = _weights(tuple(sizes[name] for name in self.prior), dtype, generator)
        weight = weight * (torch.rand(weight.shape, generator=generator) < self.kept)
        return weight.log() if self.log_prior else weight, (), options

    def _pattern(
        self, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor], dict[str, Any]]:
        num_queries = self.queries + self.more_rows
        heads = 1 if self.shared_pattern and self.groups % max(self.query_heads, 1) else self.query_heads
        num_keys = self.keys + self.more_keys
        mask = torch.rand(self.groups * heads * num_queries, num_keys, generator=generator) < self.kept
        crow, col = csr_of(mask, self.index_dtype)
        weight = _weights((col.numel(),), dtype, generator) if self.weighted else None
        if weight is not None and self.log_prior:
            weight = weight.log()
        options: dict[str, Any] = {}
        if self.more_rows:
            options["query_offsets"] = torch.randint(self.more_rows + 1, (self.batch,), generator=generator)
        if self.planned or self.more_rows or self.more_keys:
            options["plan"] = torch.ops.fiak.csr_plan(crow, col, num_queries, num_keys)
        return weight, (crow, col), options


@dataclass(frozen=True)
class Problem:
    """The arguments of one call. ``tensors`` are query, key, value and the weight: what may want a gradient."""

    case: Case
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None]
    indices: tuple[Tensor, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """The op's positional arguments, with these tensors in the place of the problem's first ones."""
        all_tensors = (*tensors, *self.tensors[len(tensors) :])
        return (*all_tensors[:3], *self.indices, all_tensors[3])

    def public(self, *tensors: Tensor | None) -> Tensor:
        return getattr(torch.ops.fiak, self.case.op)(*self.arguments(*tensors), **self.options)

    def forward(self, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return getattr(torch.ops.fiak, self.case.op + "_forward")(*self.arguments(*tensors), **self.options)

    def reference(self, *tensors: Tensor | None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        options = {name: value for name, value in self.options.items() if name != "plan"}
        if self.case.op == "csr_attention":
            options["num_queries"] = self.case.queries + self.case.more_rows
        return getattr(reference, self.case.op)(*self.arguments(*tensors), **options, dtype=dtype)

    def leaves(self, wanted: Sequence[bool] = (True,) * 4) -> list[Tensor | None]:
        """The tensors, as leaves; those that are wanted require a gradient."""
        return [
            None if tensor is None else tensor.detach().requires_grad_(want)
            for tensor, want in zip(self.tensors, wanted, strict=True)
        ]

    def grad_output(self) -> Tensor:
        case = self.case
        sizes = (case.batch, case.query_heads, case.queries, case.value_dim)
        return torch.randn(sizes, generator=torch.Generator().manual_seed(1)).to(self.tensors[0].dtype)

    def run(self, name: str = "forward", wanted: Sequence[bool] = (True,) * 4, **kwargs: Any) -> Results:
        """Output, logsumexp and the wanted gradients of ``forward`` or ``reference``."""
        leaves = self.leaves(wanted)
        output, logsumexp = getattr(self, name)(*leaves, **kwargs)
        inputs = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(output, inputs, self.grad_output().to(output.dtype)) if inputs else ())
        grads = [next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves]
        return Results(output.detach(), logsumexp.detach(), *grads)

    def replaced(self, **options: Any) -> Problem:
        return replace(self, options={**self.options, **options})


@dataclass(frozen=True)
class Results:
    output: Tensor
    logsumexp: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    weight: Tensor | None = None

    def items(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in vars(self).items() if tensor is not None)


def csr_of(mask: Tensor, index_dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """crow_indices and col_indices of a boolean mask whose last dimension is the columns."""
    rows = mask.flatten(0, -2)
    crow = torch.cat([torch.zeros(1, dtype=torch.long), rows.sum(1).cumsum(0)])
    return crow.to(index_dtype), rows.nonzero()[:, 1].to(index_dtype)


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).abs().max())


def _weights(sizes: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.rand(sizes, generator=generator, dtype=torch.float64).mul(0.8).add(0.2).to(dtype)


def _laid_out(sizes: tuple[int, ...], layout: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    b, h, n, d = sizes

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "transposed":
        return randn(b, n, h, d).transpose(1, 2)
    if layout == "sliced":
        return randn(b, 2 * h, n + 3, d + 5)[:, ::2, 2 : n + 2, 1 : d + 1]
    if layout == "expanded":
        return randn(1, 1, n, d).expand(sizes)
    if layout == "strided columns":
        return randn(b, h, n, 2 * d)[..., ::2]
    return randn(*sizes)


# Small ones, each with something of its own: for gradcheck, opcheck and everything that wants all features.
PRIOR_CASES = [
    Case("prior_attention"),
    Case("prior_attention", prior=None),
    Case("prior_attention", prior=None, score="gaussian", kv_lens=True),
    Case("prior_attention", prior="G1NM", groups=2),
    Case("prior_attention", prior="GH1M", score="gaussian"),
    Case("prior_attention", prior="G11M", batch=4, groups=2, kv_lens=True),
    Case("prior_attention", is_causal=True, keys=4),
    Case("prior_attention", is_causal=True, queries=6, keys=3, kv_lens=True, score="gaussian"),
    Case("prior_attention", query_heads=4, key_heads=2, layouts=("transposed", "sliced", "expanded")),
    Case("prior_attention", query_heads=3, key_heads=1, prior="GH1M", dropout_p=0.4),
    Case("prior_attention", dropout_p=0.3, score="gaussian", is_causal=True, groups=2),
    Case("prior_attention", kept=0.2, scale=-0.7, layouts=("strided columns",) * 3),
    Case("prior_attention", scale=0.0, kept=1.0),
    Case("prior_attention", log_prior=True, kv_lens=True),
    Case("prior_attention", log_prior=True, prior="GH1M", is_causal=True, dropout_p=0.3, score="gaussian"),
]
CSR_CASES = [
    Case("csr_attention"),
    Case("csr_attention", weighted=True),
    Case("csr_attention", weighted=True, score="gaussian", kv_lens=True, index_dtype=torch.int32),
    Case("csr_attention", weighted=True, groups=2, batch=4, planned=True),
    Case("csr_attention", query_heads=4, key_heads=2, layouts=("transposed", "sliced", "expanded"), kept=0.3),
    Case("csr_attention", weighted=True, more_rows=3, query_heads=2, key_heads=1, kv_lens=True),
    Case("csr_attention", more_rows=2, dropout_p=0.4, score="gaussian", groups=2),
    Case("csr_attention", weighted=True, dropout_p=0.3, kept=0.2, scale=-0.7, layouts=("strided columns",) * 3),
    Case("csr_attention", kept=0.0),
    Case("csr_attention", weighted=True, log_prior=True, kv_lens=True),
    Case("csr_attention", weighted=True, log_prior=True, groups=2, dropout_p=0.3, more_rows=2, score="gaussian"),
    Case("csr_attention", scale=0.0, kept=1.0, planned=True),
    Case("csr_attention", query_heads=4, key_heads=2, shared_pattern=True, weighted=True, score="gaussian"),
    Case("csr_attention", query_heads=4, groups=2, batch=4, shared_pattern=True, more_rows=2, dropout_p=0.4, kept=0.3),
    Case("csr_attention", more_keys=3, weighted=True, kv_lens=True),
    Case("csr_attention", more_keys=40, more_rows=3, query_heads=3, key_heads=1, shared_pattern=True, kept=0.3),
]


# The sizes of the paper's models, and more than one block of keys.
LARGE_PRIOR_CASES = [
    Case("prior_attention", query_heads=4, key_heads=4, queries=197, keys=197, head_dim=48, value_dim=48),
    Case("prior_attention", queries=256, keys=256, head_dim=16, value_dim=16, is_causal=True, prior="GH1M"),
    Case("prior_attention", batch=1, queries=150, keys=1000, head_dim=128, value_dim=64, score="gaussian"),
]
LARGE_CSR_CASES = [
    Case("csr_attention", query_heads=4, key_heads=4, queries=197, keys=197, head_dim=48, value_dim=48, kept=0.3),
    Case("csr_attention", queries=256, keys=256, head_dim=16, value_dim=16, kept=0.1, weighted=True, planned=True),
    Case("csr_attention", batch=1, queries=150, keys=1000, head_dim=128, value_dim=64, kept=0.5, score="gaussian"),
    Case("csr_attention", queries=150, keys=300, more_keys=500, shared_pattern=True, kept=0.6, head_dim=16),
]


def random_case(op: str, seed: int) -> Case:
    """A case of the sweep: any sizes, layouts and options at once."""
    rng = np.random.default_rng(seed)

    def size(low: int, high: int) -> int:  # mostly small, sometimes large
        return int(rng.integers(low, high + 1) if rng.random() < 0.4 else rng.integers(low, min(high, 9) + 1))

    key_heads = int(rng.integers(0 if rng.random() < 0.05 else 1, 4))
    groups = int(rng.integers(1, 3))
    return Case(
        op,
        batch=groups * int(rng.integers(0 if rng.random() < 0.05 else 1, 4)),
        query_heads=key_heads * int(rng.integers(1, 4)),
        key_heads=key_heads,
        queries=size(0, 80),
        keys=size(0, 90),
        head_dim=size(1, 130),
        value_dim=size(1, 130),
        layouts=tuple(str(layout) for layout in rng.choice(LAYOUTS, 3)),  # type: ignore[arg-type]
        score=str(rng.choice(["dot", "gaussian"])),
        scale=[None, 0.0, 0.3, -0.2][int(rng.choice(4, p=[0.7, 0.1, 0.1, 0.1]))],
        kv_lens=bool(rng.random() < 0.3),
        dropout_p=float(rng.choice([0.0, 0.25, 1.0], p=[0.7, 0.25, 0.05])),
        groups=groups,
        kept=float(rng.choice([0.0, 0.1, 0.3, 0.6, 1.0], p=[0.05, 0.25, 0.3, 0.3, 0.1])),
        prior=[None, "GHNM", "G1NM", "GH1M", "G11M"][int(rng.integers(5))],
        is_causal=bool(rng.random() < 0.3),
        weighted=bool(rng.random() < 0.5),
        index_dtype=torch.int32 if rng.random() < 0.5 else torch.int64,
        planned=bool(rng.random() < 0.5),
        more_rows=int(rng.integers(0, 6)) if rng.random() < 0.3 else 0,
        more_keys=int(rng.integers(0, 60)) if rng.random() < 0.3 else 0,
        shared_pattern=bool(rng.random() < 0.3),
        log_prior=bool(rng.random() < 0.3),
    )


@contextmanager
def cpu_isa(isa: str) -> Iterator[None]:
    """Calls inside run on kernels of this instruction set."""
    before = os.environ.get("FIAK_CPU_ISA")
    os.environ["FIAK_CPU_ISA"] = isa
    try:
        yield
    finally:
        if before is None:
            del os.environ["FIAK_CPU_ISA"]
        else:
            os.environ["FIAK_CPU_ISA"] = before


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def isas_of(dtype: torch.dtype) -> list[str]:
    """The instruction sets of this machine whose kernels calls with this dtype may run on."""
    found: list[str] = []
    for level in ("scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"):
        with cpu_isa(level):
            if _C.kernel_isa(str(dtype).removeprefix("torch.")) == level:
                found.append(level)
    return found


KERNELS = [(isa, dtype) for dtype in DTYPES for isa in isas_of(dtype)]


def assert_close_enough(problem: Problem) -> None:
    """The error bound against the float64 reference, for the output, logsumexp and all gradients.

    The error may be twice that of the same formulas in eager torch of the same dtype, and a few roundings of the terms
    that the result is a sum of. logsumexp, which does not depend on the low precision of a dtype, is held to float32.
    """
    dtype = problem.tensors[0].dtype
    actual, exact, eager = problem.run(), problem.run("reference"), problem.run("reference", dtype=dtype)
    roundings = _roundings(problem, exact)
    for name, tensor in actual.items():
        wanted = getattr(exact, name).double()
        assert tensor.shape == wanted.shape, name
        finite = wanted.isfinite()
        assert torch.equal(tensor.double()[~finite], wanted[~finite]), name
        if not finite.any():
            continue
        ours, theirs = (error(x[finite], wanted[finite]) for x in (tensor, getattr(eager, name)))
        allowed = roundings[name] + (2 * theirs if name != "logsumexp" and math.isfinite(theirs) else 0)
        assert ours <= allowed, f"{name}: error {ours:.3g} > {allowed:.3g}"


def _roundings(problem: Problem, exact: Results) -> dict[str, float]:
    """Two roundings of each result's largest sum of absolute values: the error that remains where terms cancel."""
    case = problem.case
    if 0 in (case.batch, case.query_heads, case.queries, case.keys):
        return dict.fromkeys(vars(exact), 0.0)
    dtype = problem.tensors[0].dtype
    query, key, value = (x.detach().double().abs() for x in problem.tensors[:3] if x is not None)
    repeats = case.query_heads // case.key_heads
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    grad_output = problem.grad_output().double().abs()
    scale = abs(case.head_dim**-0.5 if case.scale is None else case.scale)
    kept = 1 / (1 - case.dropout_p) if case.dropout_p < 1 else 0.0

    # The normalised weights are the output for unit vectors as values; without a weight, exp(s - logsumexp).
    units = torch.eye(case.keys).expand(case.batch, case.key_heads, -1, -1)
    undropped = problem.replaced(dropout_p=0.0)
    attention, logsumexp = undropped.reference(*problem.tensors[:2], units)
    unweighted, unweighted_logsumexp = undropped.reference(*problem.tensors[:2], units, None)
    ratio = unweighted * (unweighted_logsumexp - logsumexp).exp().nan_to_num(0, 0)[..., None]
    if case.log_prior:
        ratio = attention

    delta = (grad_output * exact.output.abs()).sum(-1, keepdim=True)
    grad_weight = kept * grad_output @ value.mT + delta
    grad_score = scale * attention * grad_weight
    shape = "GHNM" if case.prior is None or case.op == "csr_attention" else case.prior
    sums = {
        "output": kept * attention @ value,
        "query": grad_score @ key,
        "key": (grad_score.mT @ query + grad_score.sum(2)[..., None] * key).unflatten(1, (-1, repeats)).sum(2),
        "value": kept * (attention.mT @ grad_output).unflatten(1, (-1, repeats)).sum(2),
        "weight": (ratio * grad_weight).sum([0, *(dim for dim, size in enumerate(shape) if size == "1")]),
    }
    score = scale * float(key.norm(dim=-1).max() * (query.norm(dim=-1).max() + key.norm(dim=-1).max() / 2))
    accumulated = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * max(score, 1)
    rounding = 2 * (torch.finfo(dtype).eps + accumulated)
    return {"logsumexp": 4 * accumulated, **{name: rounding * float(x.max()) for name, x in sums.items()}}
