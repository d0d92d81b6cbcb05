"""How time and memory grow: each size in a process of its own, the size doubled three times; and a decoding step.

    python -m benchmarks.scaling                       all sections: five minutes
    python -m benchmarks.scaling --section decoding

Sections: a causal window set as the pattern of a module, cropped, compacted and reported (``patterns``); the bytes of a
plan beside those of its CSR matrix (``plans``); the backward pass of three entries a row (``backward``); ``calibrate``
and ``prune`` (``calibrate``, ``prune``). Printed are seconds and the peak memory beyond what was there before. Then a
step of a converted Llama of 4 layers with 60 cached tokens, by the longest input that it is built for, dense and pruned
(``decoding``): medians of interleaved rounds, and their ratio to the shortest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.memory import peak_of
from benchmarks.timing import timed, times_of_rounds
from fiak_ext import MultiHeadSelfAttention, PriorAttention, SparsePattern, calibrate, convert, prune, set_patterns

__all__ = ["DECODING_TOKENS", "SCALED", "decoding", "main", "measure"]

DECODING_TOKENS = (128, 1024, 8192)
_CACHED = 60


def _patterns(tokens: int) -> Callable[[], str]:
    def run() -> str:
        attention = PriorAttention(8, tokens, kind="softmax", is_causal=True)
        pattern = SparsePattern.from_window(8, tokens, window_size=(255, 0), num_sinks=4, is_causal=True)
        attention.set_pattern(pattern)
        pattern.crop(tokens - 1).rows(1, tokens - 1).density_per_head()
        attention.compact()
        return f"{pattern.nnz:,} entries"

    return run


def _three_a_row(rows: int, entries: int = 3) -> SparsePattern:
    columns = torch.randint(rows, (rows, entries), generator=torch.Generator().manual_seed(0)).sort(1).values
    kept = torch.ones_like(columns, dtype=torch.bool)
    kept[:, 1:] = columns.diff(dim=1) > 0
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    return SparsePattern.from_csr(crow, columns[kept], 1, rows, rows)


def _plans(rows: int) -> Callable[[], str]:
    def run() -> str:
        pattern = _three_a_row(rows, 10)
        return f"{pattern.plan.nbytes / pattern.num_bytes:.2f} times the CSR's {pattern.num_bytes / 2**20:.0f} MiB"

    return run


def _backward(rows: int) -> Callable[[], str]:
    pattern = _three_a_row(rows)
    _ = pattern.plan
    query, key, value = (torch.randn(1, 1, rows, 32, requires_grad=True) for _ in range(3))

    def run() -> str:
        pattern.attend(query, key, value).sum().backward()
        return f"{pattern.nnz:,} entries"

    return run


def _model(tokens: int) -> nn.Module:
    return nn.Sequential(*(MultiHeadSelfAttention(32, 4, tokens, kind="softmax") for _ in range(3)))


def _calibrate(tokens: int) -> Callable[[], str]:
    model, batch = _model(tokens), torch.randn(1, tokens, 32)

    def run() -> str:
        calibrate(model, [batch])
        return f"{12 * tokens**2:,} pairs"

    return run


def _prune(tokens: int) -> Callable[[], str]:
    model = _model(tokens)

    def run() -> str:
        prune(model, 0.7, importance="random", generator=torch.Generator().manual_seed(0))
        return f"{12 * tokens**2:,} pairs"

    return run


# By section: what is called, and the four sizes; of calibrate and prune, the pairs double, not the tokens.
SCALED: dict[str, tuple[Callable[[int], Callable[[], str]], tuple[int, ...]]] = {
    "patterns": (_patterns, (4096, 8192, 16384, 32768)),
    "plans": (_plans, (125_000, 250_000, 500_000, 1_000_000)),
    "backward": (_backward, (65_537, 131_074, 262_148, 524_296)),
    "calibrate": (_calibrate, (724, 1024, 1448, 2048)),
    "prune": (_prune, (724, 1024, 1448, 2048)),
}


def measure(section: str, size: int) -> dict[str, Any]:
    """Seconds, peak bytes beyond those before, and what was done, of one size in this process."""
    make, sizes = SCALED[section]
    make(min(sizes) // 16)()  # threads, code and scratch memory of the libraries
    run = make(size)
    seconds: list[float] = []
    text: list[str] = []

    def call() -> None:
        start = time.perf_counter()
        text.append(run())
        seconds.append(time.perf_counter() - start)

    peak = peak_of(call)
    return {"seconds": seconds[0], "bytes": peak, "what": text[0]}


def _step(tokens: int, left: int | None) -> Callable[[], object]:
    """A step with ``_CACHED`` tokens in the cache, which forgets it again; ``left`` is that of the pattern's window."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    model = convert(LlamaForCausalLM(config).eval(), num_tokens=tokens)
    if left is not None:
        window = SparsePattern.from_window(4, tokens, window_size=(left, 0), num_sinks=4, is_causal=True)
        names = [name for name, module in model.named_modules() if isinstance(module, PriorAttention)]
        set_patterns(model, dict.fromkeys(names, window))
    cache = DynamicCache()
    prompt = torch.randint(64, (1, _CACHED))

    @torch.no_grad()
    def step() -> object:
        output = model(input_ids=prompt[:, :1], past_key_values=cache)
        cache.crop(-1)
        return output

    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache)
    return step


def decoding(rounds: int = 30) -> dict[str, dict[int, float]]:
    """Median seconds of a step by state ("dense", "pruned") and longest input."""
    result = {}
    for state, left in (("dense", None), ("pruned", 31)):
        steps = {str(tokens): _step(tokens, left) for tokens in DECODING_TOKENS}
        calls = {name: (lambda step=step: {"step": timed(step)[0]}) for name, step in steps.items()}
        for call in calls.values():
            call()
        times = times_of_rounds(calls, rounds=rounds, seconds=120)
        result[state] = {int(name): median(one["step"] for one in found) for name, found in times.items()}
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints all sections, or the one that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=[*SCALED, "decoding"], help="all by default")
    parser.add_argument("--one", nargs=2, metavar=("SECTION", "SIZE"), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.one:
        found = measure(options.one[0], int(options.one[1]))
        print(f"{found['seconds']:8.2f} s {found['bytes'] / 2**20:8.0f} MiB  {found['what']}")
        return
    for section, (_, sizes) in SCALED.items():
        if options.section in (None, section):
            for size in sizes:
                command = [sys.executable, "-m", "benchmarks.scaling", "--threads", str(options.threads)]
                command += ["--one", section, str(size)]
                root = Path(__file__).parents[1]
                line = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
                print(f"{section:10} {size:9,} {line}", end="", flush=True)
    if options.section in (None, "decoding"):
        for state, medians in decoding().items():
            shortest = medians[DECODING_TOKENS[0]]
            print(
                f"decoding   {state:7}"
                + ", ".join(f" {tokens:,}: {t * 1e3:.2f} ms ({t / shortest:.2f})" for tokens, t in medians.items())
            )


if __name__ == "__main__":
    main()
