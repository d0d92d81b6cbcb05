"""Figures as JSON, a row on each line, and what is made of those of a machine: tables and a plot.

``python -m benchmarks.report benchmarks/results/zen4.json`` writes zen4.md and zen4.png anew, as ``python -m
benchmarks.compare`` does once it has measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

__all__ = ["break_even", "main", "make_tables", "markdown", "models_tables", "plot", "to_json"]

Results = Mapping[str, Any]


def to_json(report: Any) -> str:
    """JSON with a line for every member of the report, and of what it has that holds nothing but objects: its rows.

    Floats are rounded to five significant digits, as many as tables show.
    """
    return _lines(json.loads(json.dumps(report), parse_float=lambda text: float(f"{float(text):.5g}"))) + "\n"


def _lines(value: Any, *, is_report: bool = True) -> str:
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not is_report and not (members and all(isinstance(member, dict) for member in members)):
        return json.dumps(value, separators=(",", ":"))
    lines = [_lines(member, is_report=False) for member in members]
    if isinstance(value, dict):
        lines = [f"{json.dumps(name)}:{line}" for name, line in zip(value, lines, strict=True)]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([opening, ",\n".join(lines), closing])


def make_tables(results: Path) -> None:
    """Writes beside a file of :mod:`benchmarks.compare` its tables (.md) and, of densities, a plot (.png)."""
    report = json.loads(results.read_text())
    results.with_suffix(".md").write_text(markdown(report, results.stem))
    if "density" in report:
        plot(report["density"], results.with_suffix(".png"))


def markdown(report: Results, name: str) -> str:
    """All sections of a report (see :mod:`benchmarks.compare`) that it has; ``name`` is that of its file."""
    machine = report["machine"]
    parts = [
        "# Speed of the ops against their peers",
        f"Made by `python -m benchmarks.compare`; the same figures are in {name}.json. Ratios are how many times "
        "faster the op is, as median (first - third quartile) of interleaved calls that each follow a matrix product "
        "which overwrites the caches. Masks: `uniform` random; `learned-like`; `recorded` (benchmarks/masks, tiled to "
        "longer sequences); N% is the share of eligible pairs that is pruned.",
        f"Machine: {machine['cpu']['model']}, {machine['cpu']['selected_isa']}; torch {machine['torch']}, "
        f"{machine['fiak_ext']['compiler']}, Python {machine['python']}; {machine['date']}.",
    ]
    if attention := report.get("attention"):
        parts += _attention(attention)
    if scaling := report.get("scaling"):
        parts += ["## Threads", "How many times faster than with the first number of threads.", _scaling(scaling)]
    if densities := report.get("density"):
        parts += ["## By density", "Forward, uniform masks; break-even is the density above which the peer is faster."]
        parts += [_densities(densities), f"![speed-up against density]({name}.png)"]
    if planning := report.get("planning"):
        parts += [
            "## Planning",
            "What `csr_plan` costs, in forward calls of `csr_attention` at B=1 in float32, uniform masks.",
            _table(
                ["case", "threads", "pruned", "plan, ms", "forward calls"],
                (
                    [
                        row["case"],
                        row["threads"],
                        f"{row['pruned']:.0%}",
                        f"{row['milliseconds']:.2f}",
                        _spread(row["calls"]),
                    ]
                    for row in planning
                ),
            ),
        ]
    if linear := report.get("linear"):
        parts += [
            "## compact_linear",
            "The projection of keys and values where every key head keeps some keys of its own, against "
            "`torch.nn.functional.linear` of all keys: how many times faster, and the same for each multiply-add.",
            _linear(linear),
        ]
    if overhead := report.get("overhead"):
        parts += [
            "## Overhead of a call",
            "B1 H1 N4 D8, float32, where the kernel has next to nothing to do, in microseconds.",
            _table(["", "microseconds"], ([row["contestant"], _spread(row["microseconds"])] for row in overhead)),
        ]
    if memory := report.get("memory"):
        parts += [
            "## Peak memory",
            "Forward and backward with a prior (a bias) that wants a gradient, B16 H4 N785 D48, float32, beyond the "
            "inputs and the output's gradient; output and gradients, 48 MB, are part of each.",
            _table(
                ["", "threads", "MB", "share of SDPA's"],
                (
                    [
                        row["contestant"],
                        row["threads"],
                        f"{row['bytes'] / 1e6:.0f}",
                        f"{row['bytes'] / _bytes_of_sdpa(memory, row['threads']):.3f}",
                    ]
                    for row in memory
                ),
            ),
        ]
    if models := report.get("models"):
        parts += models_tables(models)
    return "\n\n".join(parts) + "\n"


def _bytes_of_sdpa(memory: Sequence[Results], threads: int) -> int:
    return next(row["bytes"] for row in memory if row["contestant"].startswith("sdpa") and row["threads"] == threads)


def _attention(results: Sequence[Results]) -> list[str]:
    parts = []
    for dtype, threads, direction in _unique((row["dtype"], row["threads"], row["direction"]) for row in results):
        rows = [
            row for row in results if (row["dtype"], row["threads"], row["direction"]) == (dtype, threads, direction)
        ]
        cases = _unique(row["case"] for row in rows)
        cells = {
            (row["contestant"], baseline, row["case"]): _spread(ratio)
            for row in rows
            for baseline, ratio in row.get("ratios", {}).items()
        }
        left_out: dict[str, list[str]] = {}
        for row in rows:
            if "left_out" in row:
                left_out.setdefault(f"{row['contestant']} ({row['left_out']})", []).append(row["case"])
        parts += [
            f"## {direction[0].upper()}{direction[1:]}, {dtype}, {_threads(threads)}",
            _table(
                ["", *cases],
                (
                    [f"{contestant} / {baseline}", *(cells.get((contestant, baseline, case), "") for case in cases)]
                    for contestant, baseline in _unique((contestant, baseline) for contestant, baseline, _ in cells)
                ),
            ),
        ]
        if left_out:
            listed = (f"{what} in {', '.join(of)}" for what, of in left_out.items())
            parts.append("Left out: " + "; ".join(listed) + ".")
    if shares := _unique(f"{row['case']} {row['density']:.3f}" for row in results if "density" in row):
        parts.append(f"Share of all pairs that the recorded masks keep at the sizes of the cases: {', '.join(shares)}.")
    return parts


def _linear(results: Sequence[Results]) -> str:
    keys = _unique((row["case"], row["dtype"], row["threads"]) for row in results)
    kept = _unique(row["kept"] for row in results)
    cells = {(row["case"], row["dtype"], row["threads"], row["kept"]): row for row in results}
    return _table(
        [
            "case", "dtype", "threads",
            *(f"{share:.0%} kept" for share in kept), *(f"{share:.0%} kept, per multiply-add" for share in kept),
        ],
        (
            [*key, *(_spread(cells[(*key, share)][what]) for what in ("ratio", "per_flop") for share in kept)]
            for key in keys
        ),
    )  # fmt: skip


def _scaling(results: Sequence[Results]) -> str:
    return _table(
        ["case", "dtype", "op", "direction", "threads", "faster"],
        (
            [row["case"], row["dtype"], row["contestant"], row["direction"], row["threads"], _spread(row["ratio"])]
            for row in results
        ),
    )


def _curves(results: Sequence[Results]) -> dict[tuple[str, str, int], dict[str, list[tuple[float, float]]]]:
    """By case, dtype and threads, and by baseline: density and median ratio, ascending."""
    curves: dict[tuple[str, str, int], dict[str, list[tuple[float, float]]]] = {}
    for row in sorted(results, key=lambda row: row["density"]):
        curve = curves.setdefault((row["case"], row["dtype"], row["threads"]), {})
        for baseline, (_, ratio, _) in row["ratios"].items():
            curve.setdefault(baseline, []).append((row["density"], ratio))
    return curves


def break_even(curve: Sequence[tuple[float, float]]) -> float | None:
    """The lowest density at which the ratio falls to 1, interpolated between measured ones; None if it never does.

    Args:
        curve: (density, ratio), ascending in density.
    """
    for (before, high), (after, low) in pairwise(curve):
        if high >= 1 > low:
            return before + (after - before) * (high - 1) / (high - low)
    return None if curve[0][1] >= 1 else curve[0][0]


def _densities(results: Sequence[Results]) -> str:
    def cell(curve: Sequence[tuple[float, float]]) -> str:
        density = break_even(curve)
        return "faster at every density" if density is None else f"{density:.0%}"

    densities = sorted({row["density"] for row in results})
    return _table(
        ["case", "dtype", "threads", "against", *(f"{density:.0%}" for density in densities), "break-even"],
        (
            [*key, baseline, *(f"{dict(curve)[density]:.2f}" for density in densities), cell(curve)]
            for key, curves in _curves(results).items()
            for baseline, curve in curves.items()
        ),
    )


def plot(results: Sequence[Results], path: Path) -> None:
    """Speed-up of csr_attention against density, one panel for each dtype, with the break-even marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = _curves(results)
    dtypes = _unique(dtype for _, dtype, _ in curves)
    figure, panels = plt.subplots(1, len(dtypes), figsize=(6.5 * len(dtypes), 5), squeeze=False, sharey=True)
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        colors = iter(plt.rcParams["axes.prop_cycle"].by_key()["color"])
        for (case, of, threads), by_baseline in curves.items():
            if of != dtype:
                continue
            color = next(colors)
            for baseline, style in (("sdpa", "-"), ("sdpa bool mask", ":")):
                curve = by_baseline[baseline]
                x, y = zip(*curve, strict=True)
                label = f"{case}, {_threads(threads)}" if baseline == "sdpa" else None
                panel.plot(x, y, style, color=color, label=label)
                if baseline == "sdpa" and (even := break_even(curve)) is not None:
                    panel.plot([even], [1], "o", color=color)
                    panel.annotate(f"{even:.0%}", (even, 1), textcoords="offset points", xytext=(0, -14), color=color)
        panel.axhline(1, color="gray", linewidth=0.8)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}x"))
        panel.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        panel.set_title(f"{dtype}, forward")
        panel.set_xlabel("density: pairs kept of those eligible")
        panel.legend(
            title="solid: against dense SDPA (dot: break-even)\ndotted: with the boolean mask", fontsize="small"
        )
    panels[0][0].set_ylabel("speed of csr_attention / SDPA")
    figure.tight_layout()
    figure.savefig(path, dpi=96)
    plt.close(figure)


def models_tables(results: Sequence[Results]) -> list[str]:
    """A heading and tables for each model and number of threads, of rows as :func:`benchmarks.models.compare` has."""
    parts = []
    for model, threads in _unique((row["model"], row["threads"]) for row in results):
        rows = [row for row in results if (row["model"], row["threads"]) == (model, threads)]
        parts.append(f"## Whole {model}, {rows[0]['batch']} images, float32, {_threads(threads)}")
        for mode in _unique(mode for row in rows for mode in row["modes"]):
            speeds = {row["contestant"]: row["modes"][mode] for row in rows if mode in row["modes"]}
            baselines = _unique(baseline for speed in speeds.values() for baseline in speed["ratios"])
            parts.append(
                _table(
                    [mode, "images/s", *(f"/ {baseline}" for baseline in baselines)],
                    (
                        [
                            contestant,
                            f"{speed['images_per_second']:.0f}",
                            *(_spread(speed["ratios"][baseline]) for baseline in baselines),
                        ]
                        for contestant, speed in speeds.items()
                    ),
                )
            )
        shares = [row for row in rows if row.get("shares")]
        if shares:
            kinds = _unique(kind for row in shares for kind in row["shares"])
            parts += [
                "Where the time goes, eager:",
                _table(
                    ["", *kinds],
                    ([row["contestant"], *(f"{row['shares'].get(kind, 0):.0%}" for kind in kinds)] for row in shares),
                ),
            ]
    return parts


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _spread(quartiles: Sequence[float]) -> str:
    low, median, high = quartiles
    return f"{median:.2f} ({low:.2f} - {high:.2f})"


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="that benchmarks.compare has written")
    for path in parser.parse_args(arguments).results:
        make_tables(path)


if __name__ == "__main__":
    main()
