"""The examples of the README on models of other libraries, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fiak_ext

README = Path(__file__).parent.parent / "README.md"
(SECTION,) = re.findall(r"^## In a model of timm.*?$(.*?)^## ", README.read_text(), re.MULTILINE | re.DOTALL)
EXAMPLES = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)


class TheirAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.into = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.into(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def test_the_readme_has_an_example_of_each() -> None:
    assert len(EXAMPLES) == 4  # timm, transformers, torch.nn, and an adapter


@pytest.mark.parametrize("example", EXAMPLES[:3], ids=["timm", "transformers", "torch.nn"])
def test_examples_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"timm": timm, "transformers": transformers, "torch": torch, "fiak_ext": fiak_ext}
    exec(example, names)
    model = names["model"]
    assert isinstance(model, nn.Module)
    attentions = [module for module in model.modules() if isinstance(module, fiak_ext.PriorAttention)]
    assert attentions and all(attention.is_pruned for attention in attentions)


def test_the_example_adapter_converts() -> None:
    exec(EXAMPLES[3], {"torch": torch, "fiak_ext": fiak_ext, "TheirAttention": TheirAttention})
    torch.manual_seed(0)
    model, x = nn.Sequential(TheirAttention()), torch.randn(2, 6, 32)
    expected = model(x)
    fiak_ext.convert(model, num_tokens=6)
    torch.testing.assert_close(model(x), expected)
    fiak_ext.prune(model, 0.5, importance="random")
    pruned = model(x)
    assert not torch.allclose(pruned, expected)
    torch.testing.assert_close(fiak_ext.compact(model)(x), pruned)
