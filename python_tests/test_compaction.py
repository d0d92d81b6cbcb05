"""``compact``: the same outputs and gradients without the projections that nobody needs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fiak_ext import (
    CausalLM,
    MultiHeadSelfAttention,
    PriorAttention,
    PriorAttentionHost,
    SparsePattern,
    VisionTransformer,
    compact,
    flops,
    reference,
)

HEADS, TOKENS, DIM = 3, 8, 12


def sparse_mask(is_causal: bool = False, groups: int = 1, tokens: int = TOKENS, heads: int = HEADS) -> Tensor:
    """Heads that need 0, some and all but one of the keys."""
    mask = torch.rand((groups, heads, tokens, tokens), generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, 0] = False
    mask[:, 1, :, ::3] = False
    mask[:, 2:, :, 2] = False
    return mask.tril() if is_causal else mask


def pruned_attention(**kwargs: Any) -> MultiHeadSelfAttention:
    torch.manual_seed(0)
    module = MultiHeadSelfAttention(DIM, HEADS, TOKENS, **kwargs)
    mask = sparse_mask(module.prior_attention.is_causal, module.prior_attention.groups)
    module.prior_attention.set_pattern(SparsePattern.from_mask(mask))
    return module.double()


def pruned_model(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, PriorAttention):
            mask = sparse_mask(module.is_causal, 1, module.num_queries, module.num_heads)
            module.set_pattern(SparsePattern.from_mask(mask))
    return model


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_outputs_and_gradients_stay(is_causal: bool, qkv_bias: bool, groups: int) -> None:
    module = pruned_attention(is_causal=is_causal, qkv_bias=qkv_bias, groups=groups)
    compacted = compact(copy.deepcopy(module))
    assert dict(compacted.named_parameters()).keys() == dict(module.named_parameters()).keys()
    for tokens in (TOKENS, 5, 1):
        for lens in (None, torch.tensor([tokens, 0, 1, tokens // 2])):
            x = torch.randn(4, tokens, DIM, dtype=torch.float64, requires_grad=True)
            cotangent = torch.randn(4, tokens, DIM, dtype=torch.float64)
            expected, output = module(x, lens), compacted(x, lens)
            torch.testing.assert_close(output, expected)
            gradients = torch.autograd.grad(expected, [x, *module.parameters()], cotangent)
            found = torch.autograd.grad(output, [x, *compacted.parameters()], cotangent)
            torch.testing.assert_close(found, gradients)


def test_what_is_kept() -> None:
    module = compact(pruned_attention())
    attention = module.prior_attention
    assert attention.is_compacted and attention.keep is not None and attention.pattern is not None
    assert attention.keep.tolist() == [[-1] * 7, [1, 2, 4, 5, 7, -1, -1], [0, 1, 3, 4, 5, 6, 7]]
    assert (attention.pattern.num_queries, attention.pattern.num_keys) == (TOKENS, 7)
    assert repr(attention) == f"PriorAttention(3, 8, 8, kind='fiak', compacted to {attention.pattern.nnz} pairs, " + (
        "parameterization='logits')"
    )


def test_hidden_tokens_and_dropped_keys_are_never_read() -> None:
    module = compact(pruned_attention())
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    lens = torch.tensor([5, 3])
    expected = module(x, lens)
    for b, length in enumerate(lens.tolist()):
        x[b, length:] = torch.nan
    output = module(x, lens)
    for b, length in enumerate(lens.tolist()):
        assert torch.equal(output[b, :length], expected[b, :length])


def test_a_model_whose_every_pair_is_pruned() -> None:
    module = MultiHeadSelfAttention(DIM, HEADS, TOKENS)
    module.prior_attention.set_pattern(SparsePattern.from_mask(torch.zeros(HEADS, TOKENS, TOKENS, dtype=torch.bool)))
    x = torch.randn(2, TOKENS, DIM, requires_grad=True)
    output = compact(module)(x)
    torch.testing.assert_close(output, module.proj.bias.expand_as(output))
    output.sum().backward()
    assert x.grad is not None and not x.grad.any()


def test_attention_alone_with_shared_key_heads() -> None:
    """``PriorAttention.compact`` and ``fiak::compact_kv``: two query heads read each key head."""
    mask = sparse_mask(heads=4)
    attention = PriorAttention(4, TOKENS).double()
    attention.set_pattern(SparsePattern.from_mask(mask))
    query = torch.randn(3, 4, TOKENS, 5, dtype=torch.float64)
    key, value = (torch.randn(3, 2, TOKENS, size, dtype=torch.float64) for size in (5, 6))
    keep = attention.compact(num_key_heads=2)
    assert keep.shape == (2, int(mask[0].view(2, 2, TOKENS, TOKENS).any(2).any(1).sum(1).max()))
    compacted = torch.ops.fiak.compact_kv(key, value, keep)
    for lens in (None, torch.tensor([8, 5, 0])):
        expected, _ = reference.prior_attention(query, key, value, mask.double(), kv_lens=lens)
        torch.testing.assert_close(attention(query, *compacted, kv_lens=lens), expected)
    with pytest.raises(ValueError, match=r"key must be compacted to 2 heads of \d rows \(got 2 heads of 8 rows\)"):
        attention(query, key, value)


def vision_transformer() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(8, 4, 1, 5, DIM, 2, HEADS)


def test_a_vision_transformer() -> None:
    model = pruned_model(vision_transformer()).double()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    expected = model(images)
    assert compact(model) is model
    torch.testing.assert_close(model(images), expected)


def test_a_language_model_at_every_length() -> None:
    torch.manual_seed(0)
    model = pruned_model(CausalLM(11, TOKENS, DIM, 2, HEADS, 16, dropout=0.0)).double()
    compacted = compact(copy.deepcopy(model))
    for length in range(1, TOKENS + 1):
        tokens = torch.randint(11, (3, length))
        torch.testing.assert_close(compacted(tokens), model(tokens))
        lens = torch.randint(length + 1, (3,))
        torch.testing.assert_close(compacted(tokens, lens), model(tokens, lens))


class GroupedAttention(PriorAttentionHost):
    """A module as users write it: two query heads of DIM / 2 features for each of two key heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.prior_attention = PriorAttention(4, TOKENS)

    @property
    def model_dim(self) -> int:
        return DIM

    @property
    def num_key_heads(self) -> int:
        return 2

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(2, (4, -1)).transpose(1, 2)
        if self.prior_attention.is_compacted:
            key, value = (self.project_kept(x, layer) for layer in (self.key, self.value))
        else:
            key, value = (layer(x).unflatten(2, (2, -1)).transpose(1, 2) for layer in (self.key, self.value))
        output: Tensor = self.prior_attention(query, key, value, kv_lens=self.kept_lens(x, None))
        return output.transpose(1, 2).flatten(2)


def test_a_host_of_ones_own() -> None:
    torch.manual_seed(0)
    host, x = GroupedAttention(), torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    model = nn.Sequential(host, nn.Linear(2 * DIM, 5)).double()
    dense = flops.model_report(model, x)
    assert dense.other.torch == 2 * 2 * TOKENS * 2 * DIM * 5
    mask = sparse_mask(heads=4)
    mask[:, 1] = False  # the first key head has no query left
    host.prior_attention.set_pattern(SparsePattern.from_mask(mask))
    pruned, expected = flops.model_report(model, x), model(x)
    compact(model)
    keep = host.prior_attention.keep
    assert keep is not None and keep.shape == (2, TOKENS - 1)
    torch.testing.assert_close(model(x), expected)
    report = flops.model_report(model, x)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert report.model.now.torch == counter.get_total_flops()
    assert report.model.dense == dense.model.dense and report.other == dense.other
    assert [layer.name for layer in report.layers] == ["0"]
    gone = TOKENS + 1  # all rows of one key head and one row of the other, of key and value alike
    assert pruned.model.now.torch - report.model.now.torch == 2 * 2 * gone * DIM * DIM


def test_training_goes_on_after_compaction() -> None:
    model = compact(pruned_model(vision_transformer()))
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(5, (32,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("before", ["dense", "pruned", "compacted"])
def test_a_compacted_checkpoint_loads_into_any_state(before: str) -> None:
    source = compact(pruned_model(vision_transformer()))
    model = vision_transformer()
    if before != "dense":
        pruned_model(model)
    if before == "compacted":
        compact(model)
    model.load_state_dict(source.state_dict())
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(images), source(images))
    assert torch.equal(copy.deepcopy(model)(images), source(images))


@pytest.mark.parametrize(
    "keep",
    [
        torch.tensor([[0, 9], [0, 1], [0, 1]]),
        torch.tensor([[1, 0], [0, 1], [0, 1]]),
        torch.tensor([[-1, 0], [0, 1], [0, 1]]),
        torch.tensor([[1, 1], [0, 1], [0, 1]]),
        torch.tensor([[-2, -1], [0, 1], [0, 1]]),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(3, 2, dtype=torch.int32),
    ],
)
def test_a_malformed_keep_is_refused(keep: Tensor) -> None:
    source = compact(pruned_attention())
    with pytest.raises(RuntimeError, match=r"attention\.pattern: keep must "):
        pruned_attention().load_state_dict(source.state_dict() | {"prior_attention.keep": keep})


def test_autocast() -> None:
    module = pruned_attention().float()
    x = torch.randn(2, TOKENS, DIM)
    expected = module(x)
    compact(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x)
        assert output.dtype == torch.bfloat16
        output.float().sum().backward()
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("is_causal", [False, True])
def test_compile_without_graph_breaks(is_causal: bool) -> None:
    torch.compiler.reset()
    module = compact(pruned_attention(is_causal=is_causal)).float()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens in [(2, 8), (3, 8), (2, 5)]:
        x = torch.randn(batch, tokens, DIM)
        for lens in (None, torch.randint(1, tokens + 1, (batch,))):
            module.zero_grad()
            expected = module(x, lens)
            expected.square().sum().backward()
            gradients = [p.grad for p in module.parameters()]
            module.zero_grad()
            output = compiled(x, lens)
            output.square().sum().backward()
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close([p.grad for p in module.parameters()], gradients)


def test_wrong_uses_are_named() -> None:
    with pytest.raises(ValueError, match=r"must hold .* other PriorAttentionHost modules \(got Linear\)"):
        compact(nn.Linear(2, 2))
    model = vision_transformer()
    with pytest.raises(ValueError, match=r"model must be pruned first \(got 'blocks.0.attention' not pruned\)"):
        compact(model)
    first = next(module for module in model.modules() if isinstance(module, PriorAttention))
    pruned_model(first)
    with pytest.raises(ValueError, match=r"model must be pruned first \(got 'blocks.1.attention' not pruned\)"):
        compact(model)
    assert not first.is_compacted
    pruned_model(model)
    compact(model)
    with pytest.raises(ValueError, match=r"model must not be compacted already \(got 'blocks.0.attention' compacted\)"):
        compact(model)
    with pytest.raises(RuntimeError, match="set_pattern: the module must not be compacted"):
        pruned_model(model)
    with pytest.raises(RuntimeError, match=r"compact: the module is compacted already"):
        first.compact()
    with pytest.raises(RuntimeError, match=r"compact: the module must be pruned first"):
        PriorAttention(2, 3).compact()
