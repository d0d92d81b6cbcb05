"""The demo's results: one row for each model, as a printed table and as JSON."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

import fiak_ext
from fiak_ext import _C
from fiak_ext.demo.speed import Speed
from fiak_ext.flops import ModelFlops

__all__ = ["Row", "environment", "format_table"]


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        name: of the model.
        accuracy_before: percent, after pruning and before fine-tuning; None for a model that is not pruned.
        accuracy: percent, at the end.
        flops: of one image.
        pattern_bytes, plan_bytes: of all layers' patterns, as saved in a checkpoint, and of the plans that the kernels
            read; 0 for a model that is not pruned.
        attention_speed: of all layers' attention, without projections; ``ratio`` to dense
            ``scaled_dot_product_attention``.
        model_speed: of the whole model; ``ratio`` to the dense softmax model.
        kernel: which attention ran.
        pruning: the :class:`~fiak_ext.PruningReport` as a dict; None for a model that is not pruned.
    """

    name: str
    accuracy_before: float | None
    accuracy: float
    flops: ModelFlops
    pattern_bytes: int
    plan_bytes: int
    attention_speed: Speed
    model_speed: Speed
    kernel: str
    pruning: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain JSON types."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {
            "flops": self.flops.to_dict(),
            "attention_speed": asdict(self.attention_speed),
            "model_speed": asdict(self.model_speed),
        }


# Headings, the columns below each, and how they are justified.
_GROUPS: tuple[tuple[str, tuple[str, ...], Callable[[str, int], str]], ...] = (
    ("", ("",), str.ljust),
    ("accuracy %", ("pruned", "final"), str.rjust),
    ("attention FLOPs", ("", "saved"), str.rjust),
    ("model FLOPs", ("", "saved"), str.rjust),
    ("pattern", ("KiB",), str.rjust),
    ("attention images/s", ("", "/SDPA"), str.rjust),
    ("model images/s", ("", "/SDPA"), str.rjust),
    ("attention", ("kernel",), str.ljust),
)
_NOTES = """\
accuracy  on the test images; "pruned" is before fine-tuning
FLOPs     multiplications and additions of one image (Table 1's convention, exact); attention with its Q, K and V
          projections; saved against dense attention
pattern   the indices in a checkpoint and the plans that the kernels read
images/s  attention alone without projections, and the whole model; "/SDPA" is the speed against dense
          scaled_dot_product_attention, in float32, {batch} images at a time, {threads}; medians of interleaved runs"""


def format_table(rows: Sequence[Row], *, batch: int) -> str:
    """The table and what its columns mean.

    Args:
        rows: the models in the order of the lines.
        batch: images at a time in the speed measurements.
    """
    lines = [[columns for _, columns, _ in _GROUPS], *map(_cells, rows)]
    blocks = []
    for (heading, _, justify), block in zip(_GROUPS, zip(*lines, strict=True), strict=True):
        widths = [max(map(len, column)) for column in zip(*block, strict=True)]
        text = [heading, *(" ".join(map(justify, line, widths)) for line in block)]
        blocks.append([justify(line, max(map(len, text))) for line in text])
    table = ["   ".join(parts).rstrip() for parts in zip(*blocks, strict=True)]
    table.insert(2, "-" * max(map(len, table)))
    threads = torch.get_num_threads()
    notes = _NOTES.format(batch=batch, threads="1 thread" if threads == 1 else f"{threads} threads")
    return "\n".join([*table, "", notes])


def _cells(row: Row) -> list[tuple[str, ...]]:
    """The cells of a line, group by group."""
    pruned = row.pruning is not None
    works, speeds = (row.flops.attention, row.flops.model), (row.attention_speed, row.model_speed)
    return [
        (row.name,),
        ("" if row.accuracy_before is None else f"{row.accuracy_before:.1f}", f"{row.accuracy:.1f}"),
        *((f"{work.now.table1:,}", f"{work.reduction('table1'):.1%}" if pruned else "") for work in works),
        (f"{(row.pattern_bytes + row.plan_bytes) / 1024:.0f}" if pruned else "",),
        *((f"{speed.images_per_second:,.0f}", f"{speed.ratio:.2f}x") for speed in speeds),
        (row.kernel,),
    ]


def environment() -> dict[str, Any]:
    """Versions and machine, in plain JSON types. Numbers repeat on the same versions with the same threads."""
    return {
        "fiak_ext": fiak_ext.build_info(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _C.cpu_capabilities(),
        "threads": torch.get_num_threads(),
    }
