"""What gpu.sh's lines of JSON say, as text: counts of a stage, and summary.md."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import read_lines

__all__ = ["counts", "read_counters", "write_summary"]

Results = Mapping[str, Mapping[str, Any]]
_MOST, _NAMED = 40, 4  # failures, and names in a sentence


def counts(stage: str, results: Results, left: Sequence[str], left_count: int, seconds: float) -> str:
    """How many results of each kind a stage has, and what failed, was left out and is left to do."""
    status = Counter(result["status"] for result in results.values() if "status" in result)
    of = ", ".join(f"{count} {name}" for name, count in sorted(status.items())) or "nothing done"
    lines = [f"{stage}: {of}; {seconds:.0f} s"]
    failed = {key: result for key, result in results.items() if result.get("status") == "failed"}
    lines += [f"  FAILED {key}: {_last_line(result)}" for key, result in list(failed.items())[:_MOST]]
    if len(failed) > _MOST:
        lines.append(f"  and {len(failed) - _MOST} more")
    out: dict[str, list[str]] = {}
    for key, result in results.items():
        if "left_out" in result:
            out.setdefault(result["left_out"], []).append(key)
    lines += [f"  left out: {_some(keys, len(keys))}: {why}" for why, keys in out.items()]
    if left:
        lines.append(f"  left to do, start it again: {_some(left, left_count)}")
    return "\n".join(lines)


def read_counters(text: str) -> list[dict[str, Any]]:
    """Kernel by kernel, what ``ncu --csv --page raw`` printed; the units are joined to the names."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    names, units, *rows = csv.reader(lines[start:])
    labels = [f"{name} [{unit}]" if unit else name for name, unit in zip(names, units, strict=True)]
    wanted = [i for i, name in enumerate(names) if "__" in name or name in ("Kernel Name", "Grid Size", "Block Size")]
    return [{labels[i]: _number(row[i]) for i in wanted} for row in rows if len(row) == len(names)]


def write_summary(folder: Path) -> None:
    """summary.md of all stages' lines in a folder; of each file those of the library that its last result has."""
    text = ["# Results of gpu.sh"]
    for stage in ("build", "test", "sanitize", "time", "profile"):
        lines = read_lines(folder / f"{stage}.jsonl")
        if not lines:
            continue
        library = [line["library"] for line in lines if "key" in line][-1:]
        results = {line["key"]: line for line in lines if "key" in line and [line["library"]] == library}
        ends = [line for line in lines if "end" in line]
        left, left_count = (ends[-1]["left"], ends[-1]["left_count"]) if ends else ([], 0)
        seconds = sum(line["seconds"] for line in ends)
        text += ["", f"## {stage}", "", "```", counts(stage, results, left, left_count, seconds), "```"]
        if stage == "time":
            text += _times(results)
        if stage == "profile":
            text += _counters(results)
    part = folder / "summary.part"
    part.write_text("\n".join(text) + "\n")
    part.replace(folder / "summary.md")


def _times(results: Results) -> list[str]:
    text: list[str] = []
    if (rates := results.get("machine|rates")) is not None:
        products = [f"{name} products {rates[f'{name}_operations_per_second'] / 1e12:.1f} TFLOP/s"
                    for name in ("bfloat16", "float32")]  # fmt: skip
        reached = ", ".join([f"copies {rates['bytes_per_second'] / 1e9:.0f} GB/s", *products])
        text += ["", f"{rates['device']}, torch {rates['torch']}: {reached}. Milliseconds: medians."]
    rows = [result for result in results.values() if "contestant" in result]
    attention = [row for row in rows if "mask" in row]
    for case, dtype, direction in dict.fromkeys((row["case"], row["dtype"], row["direction"]) for row in attention):
        of = [row for row in attention if (row["case"], row["dtype"], row["direction"]) == (case, dtype, direction)]
        masks = list(dict.fromkeys(row["mask"] for row in of))
        cells = {(row["contestant"], row["mask"]): _cell(row) for row in of}
        text += ["", f"### {case}, {dtype}, {direction}", "", *_head("", *masks)]
        for name in dict.fromkeys(row["contestant"] for row in of):
            text.append(_row(name, *(cells.get((name, mask), "") for mask in masks)))
    compact = [row for row in rows if "features" in row.get("case", "")]
    if compact:
        text += ["", "### Compaction", "", *_head("", "dtype", "", "ms")]
        text += [_row(f"{row['contestant']}, {row['case']}", row["dtype"], row["direction"], _cell(row))
                 for row in compact]  # fmt: skip
    plans = {key: result for key, result in results.items() if "density" in result}
    if plans:
        columns = ("pairs", "pattern_seconds", "plan_seconds", "pattern_bytes", "plan_bytes")
        text += ["", "### Plans", "", *_head("", *columns)]
        for key, plan in plans.items():
            text.append(_row(key.removesuffix("|plan|pattern").removeprefix("attention|").replace("|", ", "),
                             *(f"{plan[name]:.4g}" if name in plan else "" for name in columns)))  # fmt: skip
    model = [row for row in rows if "model" in row]
    if model:
        text += ["", "### Models", "", *_head("", "dtype", "batch", "", "images/s")]
        for row in model:
            speed = f"{row['images_per_second']:.0f}" if "images_per_second" in row else _cell(row)
            text.append(_row(row["model"], row["dtype"], str(row["batch"]), row["contestant"], speed))
    return text


def _counters(results: Results) -> list[str]:
    text: list[str] = []
    for key, result in results.items():
        for kernel in result.get("kernels", ()):
            named = ", ".join(f"{name} {value}" for name, value in kernel.items() if name != "Kernel Name")
            text += ["", f"- {key}, {kernel.get('Kernel Name')}: {named}"]
    return text


def _some(names: Sequence[str], count: int) -> str:
    more = f" and {count - _NAMED} more" if count > _NAMED else ""
    return "; ".join(names[:_NAMED]) + more


def _cell(row: Mapping[str, Any]) -> str:
    if "milliseconds" in row:
        return f"{row['milliseconds'][1]:.4g}"
    if "bytes_ms" in row:
        return f"{row['bytes_ms']:.3g} by bytes, {row['operations_ms']:.3g} by operations"
    return str(row.get("error", row.get("left_out", "")))[:60].replace("|", "/")


def _head(*names: str) -> list[str]:
    return [_row(*names), _row(*("---" for _ in names))]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _last_line(result: Mapping[str, Any]) -> str:
    lines = str(result.get("why", "")).strip().splitlines()
    errors = [line for line in lines if line.startswith("E  ")]
    return (errors or lines[::-1] or [""])[0][:200]


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text
