"""The commands ``fiak prune``, ``flops`` and ``bench`` on small models with random weights; test_demo has ``demo``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from torch import Tensor

import fiak_ext
from fiak_ext import recipes
from fiak_ext.cli import main
from fiak_ext.demo import speed
from fiak_ext.flops import model_report

WORDS = [f"w{index}" for index in range(40)]
TOKENS = 8


def tokenizer() -> Any:
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def text_lines(count: int = 120) -> list[str]:
    """Different lines of 1 to 12 words, fewer where some are drawn twice."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 13, (count,), generator=generator).tolist()
    drawn = [torch.randint(len(WORDS), (length,), generator=generator).tolist() for length in lengths]
    return list(dict.fromkeys(" ".join(WORDS[index] for index in line) for line in drawn))


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A small BERT with random weights."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=45,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    folder = tmp_path / "bert"
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(text_lines()))
    return file


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of grey pictures, 24 for training and 8 for testing of each."""
    folder = tmp_path / "pictures"
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 24), ("test", 8)):
        for label in ("dark", "light"):
            (folder / part / label).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(128, (28, 28), generator=generator) + 127 * (label == "light")
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / part / label / f"{index}.png")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As fiak demo saves it."""
    torch.manual_seed(0)
    arguments = {
        "image_size": 28,
        "patch_size": 14,
        "in_channels": 1,
        "num_classes": 2,
        "dim": 8,
        "depth": 2,
        "num_heads": 2,
        "kind": "fiak",
    }
    state = fiak_ext.VisionTransformer(**arguments).state_dict()  # type: ignore[arg-type]
    file = tmp_path / "model.pt"
    torch.save({"arguments": arguments, "state_dict": state}, file)
    return file


def report_in(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "report.json").read_text())
    assert isinstance(report, dict)
    return report


def prune_text(encoder: Path, text: Path, out: Path, *options: str) -> int:
    arguments = ["--model", f"hf:{encoder}", "--data", str(text), "--out", str(out), "--num-tokens", str(TOKENS)]
    return main(["prune", *arguments, "--batch-size", "4", "--calibration", "12", *options])


# ---------------------------------------------------------------- texts


def test_prune_a_text_encoder(encoder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prune_text(encoder, text, out, "--amount", "0.6", "--fine-tune-steps", "20", "--lr", "0.0005") == 0
    printed = capsys.readouterr()
    assert "calibrating" in printed.err and "fine-tuning" in printed.err  # progress
    report = report_in(out)
    assert report["pruning"]["pruned"] == 2 * round(0.6 * 2 * TOKENS**2) and report["pruning"]["unreached"] == 0
    scores = report["scores"]
    assert scores["dense"] == 1.0 and scores["pruned"] < scores["fine-tuned"] < 1
    assert report["options"]["amount"] == 0.6 and report["options"]["data"] == str(text)
    written = (out / "report.txt").read_text()
    assert written in printed.out and f"pruned {scores['pruned']:.4f}" in written
    assert report["flops"]["model"]["torch"]["now"] < report["flops"]["model"]["torch"]["dense"]

    model = fiak_ext.from_pretrained(out).eval()
    dense = transformers.BertModel.from_pretrained(encoder).eval()
    data = recipes.text_batches(
        tokenizer(), text_lines(), TOKENS, fill=True, calibration=12, tuning=80, batch_size=4, evaluation=256
    )
    cosine = recipes.mean_cosine(recipes.embed(model, data.evaluation), recipes.embed(dense, data.evaluation))
    assert cosine == pytest.approx(scores["fine-tuned"], abs=1e-6)


def test_lines_are_texts_of_their_own(encoder: Path, text: Path, tmp_path: Path) -> None:
    filled, lines = tmp_path / "filled", tmp_path / "lines"
    for out, how in ((filled, "fill"), (lines, "lines")):
        assert prune_text(encoder, text, out, "--amount", "0.5", "--texts", how, "--importance", "random") == 0
    assert report_in(filled)["scores"] != report_in(lines)["scores"]
    again = tmp_path / "again"
    assert prune_text(encoder, text, again, "--amount", "0.5", "--importance", "random") == 0
    assert report_in(again)["scores"] == report_in(filled)["scores"]


def test_does_not_overwrite(encoder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    assert prune_text(encoder, text, out, "--amount", "0.5") == 2
    assert (
        capsys.readouterr().err == f"fiak prune: --out: {out} must not exist or be empty, unless --overwrite is given\n"
    )
    assert [file.name for file in out.iterdir()] == ["precious"]
    assert prune_text(encoder, text, out, "--amount", "0.5", "--overwrite") == 0
    assert (out / "precious").is_file() and (out / "report.json").is_file()


def test_flops_and_bench_of_what_prune_wrote(
    encoder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_SECONDS", 0.01)
    out = tmp_path / "out"
    assert prune_text(encoder, text, out, "--amount", "0.6", "--scope", "head", "--keys", "0.25") == 0
    capsys.readouterr()
    assert main(["flops", "--model", str(out), "--num-tokens", str(TOKENS), "--batch-size", "3"]) == 0
    ids = torch.ones(3, TOKENS, dtype=torch.int64)
    counts = model_report(fiak_ext.from_pretrained(out), input_ids=ids, attention_mask=ids)
    assert capsys.readouterr().out == counts.table("torch") + "\n"
    assert main(["bench", "--model", f"hf:{out}", "--num-tokens", str(TOKENS), "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert re.match(r"2 inputs at a time, \d+ threads: [\d,.]+ inputs/s, \d+\.\d\d times the dense model", printed)
    assert main(["bench", "--model", f"hf:{encoder}", "--num-tokens", "4", "--amount", "0.5"]) == 0
    assert main(["flops", "--model", str(out), "--num-tokens", "4", "--amount", "0.5"]) == 2
    assert "--amount must be left out" in capsys.readouterr().err


def language_model(folder: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=45,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def text_classifier(folder: Path, num_labels: int = 3) -> None:
    config = transformers.BertConfig(
        vocab_size=45,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=16,
        initializer_range=0.5,
        num_labels=num_labels,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)


@pytest.mark.parametrize("make", [language_model, text_classifier])
def test_prune_what_predicts(
    make: Callable[[Path], None], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    folder, out = tmp_path / "model", tmp_path / "out"
    make(folder)
    tokenizer().save_pretrained(folder)
    tuning = ["--texts", "lines", "--fine-tune-steps", "20", "--lr", "0.01"]
    assert prune_text(folder, text, out, "--amount", "0.6", *tuning) == 0
    report = report_in(out)
    causal = make is language_model
    pairs = 4 * (TOKENS * (TOKENS + 1) // 2 if causal else TOKENS**2)
    assert report["pruning"]["pruned"] == 2 * round(0.6 * pairs)
    scores = report["scores"]
    assert scores["dense"] == 0.0 < scores["fine-tuned"] < 0.95 * scores["pruned"]
    assert report["measure"] == "mean KL divergence from the dense model's predictions, in nats"

    # By hand, each text alone and without padding.
    model = fiak_ext.from_pretrained(out).eval()
    dense = type(model).from_pretrained(folder).eval()
    data = recipes.text_batches(tokenizer(), text_lines(), TOKENS, fill=False, batch_size=1, evaluation=256)
    divergences = []
    with torch.no_grad():
        for batch in data.evaluation:
            own, target = (module(input_ids=batch["input_ids"]).logits.softmax(-1) for module in (model, dense))
            divergences.append((target * (target / own).log()).sum(-1).flatten())
    assert scores["fine-tuned"] == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-3)

    capsys.readouterr()
    assert main(["flops", "--model", str(out), "--num-tokens", str(TOKENS)]) == 0
    assert f"{report['flops']['model']['torch']['now']:,}" in capsys.readouterr().out


def test_dense_models_that_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_SECONDS", 0.01)
    language_model(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert main(["bench", "--model", f"hf:{tmp_path}", "--num-tokens", "4", "--amount", "0.5"]) == 0


# ---------------------------------------------------------------- images


def test_prune_an_image_classifier_of_transformers(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_SECONDS", 0.01)
    torch.manual_seed(0)
    folder, out = tmp_path / "vit", tmp_path / "out"
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=28,
        patch_size=14,
        num_labels=2,
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    arguments = ["--model", f"hf:{folder}", "--data", str(pictures), "--out", str(out), "--dead-rows"]
    tuning = ["--fine-tune-steps", "20", "--lr", "0.01", "--batch-size", "8", "--calibration", "16"]
    assert main(["prune", *arguments, *tuning, "--amount", "0.5", "--importance", "gradient"]) == 0
    report = report_in(out)
    assert report["pruning"]["dead"] == 2 * 4 * 5  # rows 1 to 4 of both heads of the last layer
    assert report["scores"]["fine-tuned"] == 100.0
    model = fiak_ext.from_pretrained(out).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    for label, name in enumerate(("dark", "light")):
        files = sorted((pictures / "test" / name).iterdir())
        batch = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")
        assert model(**batch).logits.argmax(1).tolist() == [label] * len(files)
    capsys.readouterr()
    assert main(["flops", "--model", str(out)]) == 0
    assert f"{report['flops']['model']['torch']['now']:,}" in capsys.readouterr().out
    assert main(["bench", "--model", str(out), "--batch-size", "2"]) == 0


@pytest.mark.parametrize("importance", ["prior", "gradient"])
def test_prune_a_checkpoint_of_the_demo(
    importance: str, checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--model", str(checkpoint), "--data", str(pictures), "--out", str(out), "--importance", importance]
    tuning = ["--fine-tune-steps", "12", "--lr", "0.01", "--batch-size", "8", "--calibration", "16"]
    assert main(["prune", *options, *tuning, "--dead-rows", "--target-flops", "0.97", "--scope", "global"]) == 0
    report = report_in(out)
    assert report["pruning"]["dead"] == 2 * 4 * 5  # rows 1 to 4 of both heads of the last layer
    assert report["pruning"]["flops"] <= 0.97 and report["options"]["target_flops"] == 0.97
    assert report["scores"]["fine-tuned"] == 100.0 and report["scores"]["fine-tuned"] > report["scores"]["pruned"]
    capsys.readouterr()
    assert main(["flops", "--model", str(out), "--convention", "table1"]) == 0
    saved = report["flops"]["model"]["table1"]
    assert f"{saved['dense']:,}" in (printed := capsys.readouterr().out) and f"{saved['now']:,}" in printed
    assert main(["prune", *options[2:], "--model", str(out), "--amount", "0.5", "--overwrite"]) == 2
    assert "must not be pruned already" in capsys.readouterr().err


def test_prune_a_model_of_timm(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--model", "timm:test_vit", "--random-weights", "--data", str(pictures), "--amount", "0.5"]
    sizes = ["--batch-size", "4", "--calibration", "4", "--fine-tune-steps", "1"]
    assert main(["prune", *arguments, *sizes, "--out", str(out)]) == 0
    assert report_in(out)["scores"]["dense"] == 0.0  # of 1000 classes
    capsys.readouterr()
    assert main(["flops", "--model", str(out)]) == 0
    assert f"{report_in(out)['flops']['model']['torch']['now']:,}" in capsys.readouterr().out
    assert main(["flops", "--model", "timm:test_vit", "--amount", "0.5"]) == 0
    assert "model" in capsys.readouterr().out


def test_pictures_in_one_part_are_split(pictures: Path, tmp_path: Path) -> None:
    arguments = ["--model", "timm:test_vit", "--random-weights", "--data", str(pictures / "train"), "--amount", "0.5"]
    sizes = ["--batch-size", "4", "--calibration", "4", "--importance", "random"]
    assert main(["prune", *arguments, *sizes, "--out", str(tmp_path / "out")]) == 0


# ---------------------------------------------------------------- errors


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    try:
        assert main(arguments) == 2
    except SystemExit as exit_:
        assert exit_.code == 2
        return capsys.readouterr().err
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith(f"fiak {arguments[0]}: ")]
    assert len(lines) == 1 and "Traceback" not in printed and printed.endswith(f"{lines[0]}\n")
    return lines[0]


def test_errors_are_one_line(
    encoder: Path, text: Path, checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"not a checkpoint")
    short = tmp_path / "short.txt"
    short.write_text("w1 w2\n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\xfd")
    other = tmp_path / "other"
    other.mkdir()
    (other / "fiak.json").write_text('{"sklearn": "svm"}')
    regression = tmp_path / "regression"
    text_classifier(regression, num_labels=1)
    tokenizer().save_pretrained(regression)
    model = f"hf:{encoder}"
    for options, message in (
        ([model, text, "0.5"], "--num-tokens is required for a text model"),
        ([model, tmp_path / "none", "0.5", "--num-tokens", "8"], "none must exist"),
        ([model, short, "0.5", "--num-tokens", "8"], "lines must give 48 texts"),
        ([model, binary, "0.5", "--num-tokens", "8"], "must be a text file in UTF-8"),
        ([model, pictures, "0.5", "--num-tokens", "8"], "must be a text file"),
        ([model, text, "0.5", "--num-tokens", "2"], "must leave room beside the special tokens"),
        ([model, text, "0.1", "--num-tokens", "8", "--keys", "0.5", "--batch-size", "4"], "keys=0.5 alone removes"),
        ([model, text, "0.1", "--num-tokens", "8", "--importance", "gradient"], "gradient needs labels"),
        ([model, text, "0.1", "--num-tokens", "8", "--importance", "prior", "--batch-size", "4"], "needs a prior"),
        ([f"hf:{regression}", text, "0.5", "--num-tokens", "8"], "must tell at least two classes apart (got 1)"),
        (["hf:" + str(pictures), text, "0.5"], "must be a model of transformers"),
        ([str(tmp_path / "none"), text, "0.5"], "--model must be hf:PATH, timm:NAME, a checkpoint"),
        ([str(broken), pictures, "0.5"], "must be a checkpoint of fiak demo"),
        ([str(other), pictures, "0.5"], "must name a model as fiak prune does"),
        ([str(checkpoint), text, "0.5"], "is not a folder"),
        (["timm:none_at_all", pictures, "0.5"], "timm:none_at_all must be a model of timm"),
        ([model, text, "1.5"], "must be from 0 to 1 (got 1.5)"),
    ):
        spec, data, amount, *rest = map(str, options)
        arguments = ["--model", spec, "--data", data, "--amount", amount, "--out", str(out), *rest]
        assert message in refused(["prune", *arguments], capsys)
        assert not out.exists()
    assert "--num-tokens is required" in refused(["bench", "--model", model], capsys)
    assert "one of the arguments --amount --target-flops is required" in refused(
        ["prune", "--model", model, "--data", str(text), "--out", str(out)], capsys
    )


def test_nothing_is_unpickled(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hostile.pt"
    torch.save({"arguments": print, "state_dict": {}}, file)
    options = ["--data", str(pictures), "--amount", "0.5", "--out", str(tmp_path / "out")]
    assert "must be a checkpoint of fiak demo" in refused(["prune", "--model", str(file), *options], capsys)


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("prune", "flops", "bench", "demo"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        printed = capsys.readouterr().out
        assert f"fiak {command} " in printed.partition("example:")[2]
        assert max(map(len, printed.splitlines())) <= 120


def test_as_a_module_and_as_a_script() -> None:
    script = Path(__file__).parents[1] / "pyproject.toml"
    assert 'fiak = "fiak_ext.cli:main"' in script.read_text()
    printed = subprocess.run([sys.executable, "-m", "fiak_ext", "--help"], check=True, capture_output=True, text=True)
    assert printed.stdout.startswith("usage: fiak")


# ---------------------------------------------------------------- texts and fine-tuning by themselves


def all_texts(batches: list[dict[str, Tensor]]) -> list[tuple[int, ...]]:
    return [
        tuple(ids[: int(visible.sum())].tolist())
        for batch in batches
        for ids, visible in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("fill", [True, False])
def test_parts_of_the_texts(fill: bool) -> None:
    lines = text_lines(200)
    data = recipes.text_batches(
        tokenizer(), lines, 7, fill=fill, calibration=20, tuning=30, evaluation=10, batch_size=8
    )
    parts = [all_texts(part) for part in (data.calibration, data.tuning, data.evaluation)]
    assert [len(part) for part in parts] == [20, 30, 10]
    assert all(text[0] == 2 and text[-1] == 3 and len(text) <= 7 for part in parts for text in part)
    assert data.lengths().tolist() == [len(text) for text in parts[2]]
    words = [[token - 5 for token in text[1:-1]] for text in parts[2]]
    last = lines[len(lines) - len(lines) // 5 :]
    held_out = " ".join(last).split()
    if fill:
        assert all(len(text) == 7 for part in parts for text in part)
        starts = {tuple(held_out[start : start + 5]) for start in range(0, len(held_out), 5)}
        assert all(tuple(WORDS[word] for word in text) in starts for text in words)
    else:
        assert {len(text) for part in parts for text in part} == set(range(3, 8))
        lasts = {tuple(line.split()[:5]) for line in last}
        assert all(tuple(WORDS[word] for word in text) in lasts for text in words)
    again = recipes.text_batches(
        tokenizer(), lines, 7, fill=fill, calibration=20, tuning=30, evaluation=10, batch_size=8
    )
    assert all_texts(again.tuning) == parts[1]


def test_embeddings_ignore_padding(encoder: Path) -> None:
    model = transformers.BertModel.from_pretrained(encoder).eval()
    ids = torch.randint(5, 45, (2, 6))
    visible = torch.ones_like(ids)
    visible[1, 3:] = 0
    both = recipes.embed(model, [{"input_ids": ids, "attention_mask": visible}])
    alone = recipes.embed(model, [{"input_ids": ids[1:, :3], "attention_mask": visible[1:, :3]}])
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(2))
    hidden = model(input_ids=ids[:1]).last_hidden_state.mean(1)
    torch.testing.assert_close(both[:1], hidden / hidden.norm(), rtol=1e-5, atol=1e-6)
    assert recipes.mean_cosine(both, both) == pytest.approx(1)
    assert recipes.cosine_loss(model)(model, {"input_ids": ids, "attention_mask": visible}).item() == pytest.approx(
        0, abs=1e-6
    )


def test_fine_tune_takes_its_steps() -> None:
    model = torch.nn.Linear(3, 1).train()
    x, losses, seen = torch.randn(5, 3), list[float](), list[int]()

    def loss(module: torch.nn.Module, batch: int) -> Tensor:
        assert not module.training
        seen.append(batch)
        value: Tensor = (module(x) - 3).square().mean()
        return value

    recipes.fine_tune(model, iter([1, 2, 3]), loss, steps=8, lr=0.3, on_step=losses.append)
    assert seen == [1, 2, 3, 1, 2, 3, 1, 2] and len(losses) == 8 and losses[-1] < losses[0] / 2
    with pytest.raises(ValueError, match="fine_tune: batches must hold at least one batch"):
        recipes.fine_tune(model, [], loss, steps=1, lr=0.1)
