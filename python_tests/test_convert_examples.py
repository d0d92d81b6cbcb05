"""The examples of the README on models of other libraries, as they stand there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

EXAMPLES = {
    "timm": """\
model = timm.create_model("deit_tiny_patch16_224").eval()  # pretrained=True where a hub is reachable
images = torch.randn(8, 3, 224, 224)
fiak_ext.convert(model, kind="softmax")  # no priors: a trained model is pruned by the attention that it pays
fiak_ext.calibrate(model, [images])
print(fiak_ext.prune(model, 0.5, importance="posterior"))
logits = fiak_ext.compact(model)(images)
""",
    "transformers": """\
model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=2))  # or AutoModel.from_pretrained(...)
fiak_ext.convert(model, num_tokens=64)  # inputs of up to 64 tokens; train, then:
fiak_ext.prune(model, 0.7)
fiak_ext.compact(model).save_pretrained("pruned")
model = fiak_ext.from_pretrained("pruned")
""",
    "torch.nn": """\
layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
model = fiak_ext.convert(torch.nn.TransformerEncoder(layer, 2), num_tokens=32)
loss = model(torch.randn(8, 32, 64)).square().mean()  # any training loop
loss.backward()
fiak_ext.prune(model, 0.7)
""",
}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=list(EXAMPLES))
def test_examples_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    import transformers

    import fiak_ext

    monkeypatch.chdir(tmp_path)
    names = {"timm": timm, "transformers": transformers, "torch": torch, "fiak_ext": fiak_ext}
    exec(example, names)
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    attentions = [module for module in model.modules() if isinstance(module, fiak_ext.PriorAttention)]
    assert attentions and all(attention.is_pruned for attention in attentions)
