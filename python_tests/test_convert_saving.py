"""Saving and loading converted models: the same bits in another process, and nothing else than what was saved."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import CASES, Case, images, priors
from safetensors.torch import load_file, save_file
from test_convert_timm import swin

from fiak_ext import compact, convert, from_pretrained, prune

every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
HUGGING_FACE_NAMES = ("bert", "roberta", "gpt2", "llama", "vit")
HUGGING_FACE = [CASES[name] for name in HUGGING_FACE_NAMES]
every_hugging_face = pytest.mark.parametrize("case", HUGGING_FACE, ids=lambda case: case.name)
every_state = pytest.mark.parametrize("state", ["dense", "pruned", "compacted"])


def in_state(case: Case, state: str) -> Any:
    if state == "dense":
        model = case.converted(torch.float32)
        for attention in priors(model):
            torch.nn.init.normal_(attention.prior)  # type: ignore[arg-type]
        return model
    model = case.pruned(torch.float32)
    return compact(model) if state == "compacted" else model


@every_state
@every_case
def test_state_dict_and_safetensors_give_the_same_bits(case: Case, state: str, tmp_path: Path) -> None:
    source = in_state(case, state)
    expected = case.run(source, case.inputs())
    torch.save(source.state_dict(), tmp_path / "model.pt")
    model = case.converted(torch.float32)
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(case.run(model, case.inputs()), expected)
    shared = {name for name in source.state_dict() if name == "lm_head.weight"}  # tied, which safetensors refuses
    state_dict = {name: x for name, x in source.state_dict().items() if name not in shared}
    save_file(state_dict, tmp_path / "model.safetensors")
    model = case.converted(torch.float32)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=not shared)
    assert torch.equal(case.run(model, case.inputs()), expected)


@every_state
@every_hugging_face
def test_save_pretrained_and_from_pretrained(case: Case, state: str, tmp_path: Path) -> None:
    source = in_state(case, state)
    source.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    assert type(model) is type(source) and model.config.fiak == source.config.fiak
    assert [attention.is_compacted for attention in priors(model)] == [state == "compacted"] * 2
    assert torch.equal(case.run(model.eval(), case.inputs()), case.run(source, case.inputs()))
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == load_file(tmp_path / "model.safetensors").keys()


# Loads by all ways that a folder has files for.
CHILD = """
import sys
from pathlib import Path
import timm.models
import torch
from safetensors.torch import load_file

sys.path.insert(0, sys.argv[2])
from test_convert_saving import fresh, output
from fiak_ext import from_pretrained

for folder in Path(sys.argv[1]).iterdir():
    name = folder.name.partition(",")[0]
    models = {"model.pt": fresh(name), "model.safetensors": fresh(name)}
    models["model.pt"].load_state_dict(torch.load(folder / "model.pt"))
    tied = "lm_head.weight" in models["model.pt"].state_dict()
    models["model.safetensors"].load_state_dict(load_file(folder / "model.safetensors"), strict=not tied)
    if name.startswith(("vit_", "deit_", "swin_")):
        for file in ("model.pt", "model.safetensors"):
            models[f"timm, {file}"] = fresh(name)
            timm.models.load_checkpoint(models[f"timm, {file}"], str(folder / file))
    if (folder / "pretrained").is_dir():
        models["pretrained"] = from_pretrained(folder / "pretrained").eval()
    torch.save({way: output(name, model) for way, model in models.items()}, folder / "outputs.pt")
"""
SWIN = "swin_tiny_patch4_window7_224"


def fresh(name: str) -> Any:
    """A new converted model."""
    return convert(swin().float()) if name == SWIN else CASES[name].converted(torch.float32)


@torch.no_grad()
def output(name: str, model: Any) -> torch.Tensor:
    return model(images(16).float()) if name == SWIN else CASES[name].run(model, CASES[name].inputs())


def test_another_process_loads_the_same_bits(tmp_path: Path) -> None:
    expected = {}
    for name in (*CASES, SWIN):
        for state in ("dense", "pruned", "compacted"):
            source, folder = fresh(name), tmp_path / f"{name},{state}"
            folder.mkdir()
            for attention in priors(source):
                torch.nn.init.normal_(attention.prior)  # type: ignore[arg-type]
            if state != "dense":
                prune(source, 0.6, keys=0.25)
            if state == "compacted":
                compact(source)
            expected[folder] = output(name, source)
            state_dict = source.state_dict()
            torch.save(state_dict, folder / "model.pt")
            state_dict.pop("lm_head.weight", None)  # tied, which safetensors refuses
            save_file(state_dict, folder / "model.safetensors")
            if name in HUGGING_FACE_NAMES:
                source.save_pretrained(folder / "pretrained")
    subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), str(Path(__file__).parent)], check=True)
    for folder, bits in expected.items():
        outputs = torch.load(folder / "outputs.pt")
        assert (
            len(outputs)
            == 2 + 2 * folder.name.startswith(("vit_", "deit_", "swin_")) + (folder / "pretrained").is_dir()
        )
        for way, loaded in outputs.items():
            assert torch.equal(loaded, bits), (folder.name, way)


def test_pickle() -> None:
    for case in CASES.values():
        source = in_state(case, "pruned")
        model = pickle.loads(pickle.dumps(source))
        assert torch.equal(case.run(model, case.inputs()), case.run(source, case.inputs()))


def saved(tmp_path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    in_state(CASES["bert"], "pruned").save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fiak": None}, "config.json must hold 'fiak' with is_causal, kind, num_tokens"),
        ({"fiak": {"num_tokens": 8}}, "config.json must hold 'fiak' with is_causal, kind, num_tokens"),
        ({"architectures": ["pipeline"]}, "architectures must name a model of transformers"),
        ({"fiak.kind": "../x"}, "kind must be one of fiak, gmm, softmax"),
        ({"fiak.num_tokens": 9}, "pattern: SparsePattern: crow_indices must have"),
        ({"num_hidden_layers": 1}, "got none for .*encoder.layer.1|in addition"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    content, _ = saved(tmp_path)
    for name, value in config.items():
        target, _, key = name.rpartition(".")
        (content[target] if target else content)[key] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises((ValueError, RuntimeError), match=message):
        from_pretrained(tmp_path)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _, tensors = saved(tmp_path)
    first = next(
        name for name in tensors if name.endswith("layer.0.attention.self.prior_attention.pattern_col_indices")
    )
    for change, message in (
        ({first: tensors[first].flip(0)}, r"layer\.0\S+prior_attention\.pattern: "),
        ({first: tensors[first] + 100}, r"layer\.0\S+prior_attention\.pattern: "),
        ({first: None}, r"priors must be there for all attention \(got none for .*layer\.0|pattern"),
        ({"encoder.layer.7.prior_attention.prior": torch.ones(1)}, r"got \['encoder\.layer\.7\.prior_attention\.prior"),
        ({"other.weight": torch.ones(1)}, r"and \['other\.weight'\] in addition"),
        ({"pooler.dense.weight": None}, r"got none for \['pooler\.dense\.weight'\]"),
    ):
        changed: dict[str, Any] = {name: x for name, x in {**tensors, **change}.items() if x is not None}
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises((ValueError, RuntimeError), match=message):
            from_pretrained(tmp_path)


class Hostile:
    def __reduce__(self) -> Any:
        return (print, ("unpickled",))


def test_nothing_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tensors = saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    stream = io.BytesIO()
    torch.save({**tensors, "other": Hostile()}, stream)
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(stream.getvalue())
        with pytest.raises(Exception, match=r"safetensors|header"):
            from_pretrained(tmp_path)
    assert "unpickled" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"folder must hold a config\.json"):
        from_pretrained(tmp_path / "nowhere")
