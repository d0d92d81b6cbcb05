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
from counting import BytesMade
from safetensors.torch import load_file, save_file
from test_convert_timm import swin

from fiak_ext import PriorAttention, SparsePattern, compact, convert, from_pretrained, prune

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


# ---------------------------------------------------------------------------------------------------------------------
# Opened without this package

# Prints one line for each way to open each folder: what was raised, or that nothing was.
OPENED_BY_TRANSFORMERS = """
import sys
from pathlib import Path
import transformers
from transformers import AutoConfig, AutoModel, pipeline

assert "fiak_ext" not in sys.modules
if sys.argv[2] == "imported":
    import fiak_ext.integrations.transformers.base
transformers.logging.set_verbosity_error()
for folder in sorted(Path(sys.argv[1]).iterdir()):
    config = AutoConfig.from_pretrained(folder)
    own = getattr(transformers, config.architectures[0])
    for way, load in {
        "AutoModel": lambda: AutoModel.from_pretrained(folder),
        "AutoModel, eager": lambda: AutoModel.from_pretrained(folder, attn_implementation="eager"),
        "AutoModel, its config": lambda: AutoModel.from_pretrained(folder, config=config),
        "AutoModel, safetensors": lambda: AutoModel.from_pretrained(folder, use_safetensors=True, dtype="auto"),
        "its class": lambda: own.from_pretrained(folder),
        "its class, sdpa": lambda: own.from_pretrained(folder, attn_implementation="sdpa"),
        "its class, fiak": lambda: own.from_pretrained(folder, attn_implementation="fiak"),
        "pipeline": lambda: pipeline("feature-extraction", model=str(folder)),
    }.items():
        try:
            load()
        except Exception as error:
            print(f"{folder.name}|{way}|{type(error).__name__}: {error}".replace("\\n", " "))
        else:
            print(f"{folder.name}|{way}|opened")
"""


@pytest.mark.parametrize("imported", ["alone", "imported"])
def test_transformers_alone_refuses_what_is_converted(imported: str, tmp_path: Path) -> None:
    for case in HUGGING_FACE:
        for state in ("dense", "pruned", "compacted"):
            in_state(case, state).save_pretrained(tmp_path / f"{case.name},{state}")
    output = subprocess.run(
        [sys.executable, "-c", OPENED_BY_TRANSFORMERS, str(tmp_path), imported],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    lines = [line.split("|") for line in output.splitlines()]
    assert len(lines) == 15 * 8
    for name, way, result in lines:
        assert "load this checkpoint with fiak_ext.from_pretrained" in result, (name, way, result)
    for folder in tmp_path.iterdir():
        assert priors(from_pretrained(folder))


def test_a_fusion_of_the_users_own_stays(tmp_path: Path) -> None:
    model = CASES["vit"].model(torch.float32)
    model.config.fusion_config = {"patch_embeddings": False}
    convert(model).save_pretrained(tmp_path)
    fusions = json.loads((tmp_path / "config.json").read_text())["fusion_config"]
    assert len(fusions) == 2 and fusions["patch_embeddings"] is False
    assert from_pretrained(tmp_path).config.fusion_config == fusions


# ---------------------------------------------------------------------------------------------------------------------
# The files of the weights


def share(model: Any) -> list[float]:
    """The kept share of each attention."""
    return [attention.pattern.nnz / (4 * 8 * 8) for attention in priors(model) if attention.pattern is not None]


def pruned_by(amount: float) -> Any:
    model = CASES["bert"].converted(torch.float32)
    prune(model, amount, importance="random")
    return model


def test_only_the_files_of_the_weights_are_read(tmp_path: Path) -> None:
    """Other files beside them: a variant, one that sorts behind all, shards that no index names."""
    pruned_by(0.9).save_pretrained(tmp_path, variant="test")
    pruned_by(0.75).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "zzz.safetensors")
    pruned_by(0.25).save_pretrained(tmp_path, max_shard_size="5KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "model.safetensors.index.json").is_file()
    assert share(from_pretrained(tmp_path)) == [0.75, 0.75]
    assert share(from_pretrained(tmp_path, variant="test")) == pytest.approx([0.1, 0.1], abs=0.01)
    index = (tmp_path / "model.safetensors.index.json").read_text()
    pruned_by(0.5).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)  # transformers prefers the single file
    assert share(from_pretrained(tmp_path)) == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"hold model\.fp16\.safetensors or model\.safetensors\.index\.fp16\.json"):
        from_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match="variant must be a part of the name of files"):
        from_pretrained(tmp_path, variant="/../test")


def test_a_sharded_variant(tmp_path: Path) -> None:
    pruned_by(0.5).save_pretrained(tmp_path)
    pruned_by(0.25).save_pretrained(tmp_path, variant="test", max_shard_size="5KB")
    assert len(sorted(tmp_path.glob("model.test-*.safetensors"))) > 2
    assert share(from_pretrained(tmp_path)) == [0.5, 0.5]
    assert share(from_pretrained(tmp_path, variant="test")) == [0.75, 0.75]
    file = tmp_path / "model.safetensors.index.test.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= {"pooler.dense.weight": "../model.safetensors"}
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must name files of its folder"):
        from_pretrained(tmp_path, variant="test")


@pytest.mark.parametrize("state", ["dense", "pruned"])
@pytest.mark.parametrize("num_tokens", [30_000, 1.5, "16", True, 0, -8, None, [8], 10**12, 7, 16])
def test_sizes_are_compared_before_anything_is_made(num_tokens: Any, state: str, tmp_path: Path) -> None:
    in_state(CASES["bert"], state).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["fiak"]["num_tokens"] = num_tokens
    (tmp_path / "config.json").write_text(json.dumps(content))
    with (
        BytesMade() as made,
        pytest.raises(ValueError, match=r"num_tokens must be|sizes must be those of config\.json"),
    ):
        from_pretrained(tmp_path)
    assert 0 < made.largest < 4 * 600  # the largest weight has 512 numbers


@pytest.mark.parametrize("change", [{"kind": "gmm"}, {"kind": "softmax"}])
def test_another_kind_than_that_of_the_priors_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    in_state(CASES["bert"], "dense").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["fiak"] |= change
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"sizes must be those of config\.json"):
        from_pretrained(tmp_path)


def test_a_pruned_model_loads_without_dense_priors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 tokens: a dense prior would have 67 million numbers a layer."""
    diagonal = torch.arange(4096, dtype=torch.int32).repeat(4)
    model = convert(CASES["bert"].model(torch.float32), num_tokens=4096, kind="softmax")
    for attention in priors(model):
        offsets = torch.arange(4 * 4096 + 1, dtype=torch.int32)
        attention.set_pattern(SparsePattern(offsets, diagonal.clone(), 4, 4096, 4096))
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["fiak"]["kind"] = "fiak"
    (tmp_path / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(PriorAttention, "_restore_prior", small_prior_only)
    loaded = from_pretrained(tmp_path)
    assert [attention.pattern.nnz for attention in priors(loaded) if attention.pattern] == [4 * 4096] * 2
    inputs = CASES["bert"].inputs()
    assert torch.equal(CASES["bert"].run(loaded.eval(), inputs), CASES["bert"].run(model, inputs))


def small_prior_only(attention: PriorAttention, restore: Any = PriorAttention._restore_prior) -> None:
    assert attention.num_queries * attention.num_keys < 100, "a dense prior is made"
    restore(attention)


# ---------------------------------------------------------------------------------------------------------------------
# One pattern in all layers


@every_hugging_face
def test_a_pattern_that_layers_share_is_saved(case: Case, tmp_path: Path) -> None:
    model, mask = case.converted(torch.float32), case.mask()
    pattern = SparsePattern.from_mask(mask)
    for attention in priors(model):
        attention.set_pattern(pattern)
    state_dict = {name: x for name, x in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state_dict, tmp_path / "state.safetensors")
    model.save_pretrained(tmp_path / "pretrained")
    loaded = from_pretrained(tmp_path / "pretrained").eval()
    assert all(attention.pattern == pattern for attention in priors(loaded))
    assert torch.equal(case.run(loaded, case.inputs()), case.run(model, case.inputs()))
