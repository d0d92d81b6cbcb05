"""The two models and the parameter groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fiak_ext
from fiak_ext import CausalLM, PriorAttention, SparsePattern, VisionTransformer, deit_tiny, param_groups


def attentions(model: nn.Module) -> list[PriorAttention]:
    return [module for module in model.modules() if isinstance(module, PriorAttention)]


def small_vit(**kwargs: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(8, 4, 3, 5, 12, 2, 3, **kwargs)


def small_lm(**kwargs: Any) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(11, 8, 12, 2, 3, 16, **kwargs)


# ---------------------------------------------------------------- sizes


def test_deit_tiny_is_the_papers() -> None:
    """12 layers, 4 heads of 48, 197 tokens; 1253.7M multiply-adds, 1224.6M of them in the blocks."""
    model = deit_tiny(kind="softmax").eval()
    sizes = [(module.num_heads, module.num_queries, module.num_keys) for module in attentions(model)]
    assert sizes == [(4, 197, 197)] * 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    counts = counter.get_flop_counts()
    blocks = sum(sum(counts[f"VisionTransformer.blocks.{i}"].values()) for i in range(12)) // 2
    assert (counter.get_total_flops() // 2, blocks) == (1_253_683_200, 1_224_589_824)


def test_the_default_language_model_is_the_papers() -> None:
    model = CausalLM(50)
    sizes = [(module.num_heads, module.num_queries, module.is_causal) for module in attentions(model)]
    assert sizes == [(8, 256, True)] * 16
    mlp = [(layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert mlp.count((128, 2048)) == mlp.count((2048, 128)) == 16
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.1}


def test_embeddings_of_the_language_model_are_tied() -> None:
    assert [name for name, p in small_lm().named_parameters() if 11 in p.shape] == ["token_embedding.weight"]


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("kind", ["fiak", "gmm", "softmax"])
@pytest.mark.parametrize("parameterization", ["logits", "clamp"])
def test_all_kinds_start_as_the_softmax_model(kind: str, parameterization: str) -> None:
    images, tokens = torch.randn(2, 3, 8, 8), torch.randint(11, (2, 6))
    for build, inputs in ((small_vit, images), (small_lm, tokens)):
        model = build(kind=kind, parameterization=parameterization).eval()
        torch.testing.assert_close(model(inputs), build(kind="softmax").eval()(inputs))
    assert small_vit()(images).shape == (2, 5)
    assert small_lm()(tokens).shape == (2, 6, 11)


@pytest.mark.parametrize("pruned", [False, True])
def test_the_language_model_sees_no_later_token(pruned: bool) -> None:
    model = small_lm(dropout=0.0)
    if pruned:
        for attention in attentions(model):
            attention.set_pattern(SparsePattern.from_mask(torch.rand(3, 8, 8).lt(0.7).tril()))
    tokens = torch.randint(11, (2, 8))
    expected = model(tokens)
    for length in range(1, 8):
        torch.testing.assert_close(model(tokens[:, :length]), expected[:, :length])
    lens = torch.tensor([3, 8])
    torch.testing.assert_close(model(tokens, lens)[0, :3], expected[0, :3])


def test_dropout_is_for_training() -> None:
    for model, inputs in (
        (small_vit(dropout=0.5), torch.randn(2, 3, 8, 8)),
        (small_lm(dropout=0.5), torch.randint(11, (2, 6))),
    ):
        assert not torch.equal(model(inputs), model(inputs))
        model.eval()
        assert torch.equal(model(inputs), model(inputs))


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("parameterization", ["logits", "clamp"])
def test_training(parameterization: str, pruned: bool) -> None:
    model = small_vit(parameterization=parameterization)
    if pruned:
        for attention in attentions(model):
            attention.set_pattern(SparsePattern.from_mask(torch.rand(3, 5, 5) < 0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.01, weight_decay=0.01))
    images, labels = torch.randn(32, 3, 8, 8), torch.randint(5, (32,))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("pruned", [False, True])
def test_compile_with_inductor(pruned: bool) -> None:
    torch.compiler.reset()
    model = small_lm(dropout=0.0)
    if pruned:
        for attention in attentions(model):
            attention.set_pattern(SparsePattern.from_mask(torch.rand(3, 8, 8).lt(0.7).tril()))
    tokens = torch.randint(11, (2, 8))
    expected = model(tokens)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    output = torch.compile(model, fullgraph=True)(tokens)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), list(model.parameters())), gradients)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"image_size must be a multiple of patch_size \(got 9 and 4\)"):
        VisionTransformer(9, 4, 3, 5, 12, 2, 3)
    with pytest.raises(ValueError, match=r"images must be \[batch, \*\(3, 8, 8\)\] \(got shape \(2, 3, 16, 16\)\)"):
        small_vit()(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"tokens must be \[batch, at most 8\] \(got shape \(2, 9\)\)"):
        small_lm()(torch.zeros(2, 9, dtype=torch.int64))


# ---------------------------------------------------------------- parameter groups


def test_param_groups() -> None:
    model = small_vit(qkv_bias=False)
    groups = {group["name"]: group for group in param_groups(model, lr=0.1, weight_decay=0.2)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "decayed": (0.1, 0.2),
        "not decayed": (0.1, 0.0),
        "logits priors": (pytest.approx(3.0), 0.0),
    }
    assert all(p.dim() > 1 for p in groups["decayed"]["params"])
    assert all(p.dim() == 1 for p in groups["not decayed"]["params"])
    assert [id(p) for p in groups["logits priors"]["params"]] == [id(a.prior) for a in attentions(model)]
    grouped = [p for group in groups.values() for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


def test_learning_rates_of_the_priors() -> None:
    model = nn.ModuleList([PriorAttention(2, 3), PriorAttention(2, 3, parameterization="clamp")])
    rates = {group["name"]: group["lr"] for group in param_groups(model, lr=0.1)}
    assert rates == {"logits priors": pytest.approx(3.0), "clamp priors": pytest.approx(0.5)}
    assert {group["lr"] for group in param_groups(model, lr=0.1, prior_lr=0.0)} == {0.0}


def test_param_groups_leave_out_what_is_frozen_or_gone() -> None:
    model = small_vit()
    for attention in attentions(model):
        attention.set_pattern(SparsePattern.from_mask(torch.ones(3, 5, 5, dtype=torch.bool)))
    model.head.requires_grad_(False)
    groups = param_groups(model, lr=0.1)
    assert [group["name"] for group in groups] == ["decayed", "not decayed"]
    grouped = {id(p) for group in groups for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters()} - {id(p) for p in model.head.parameters()}


# ---------------------------------------------------------------- the package


def test_which_kernel() -> None:
    assert fiak_ext.which_kernel("csr_attention", torch.float64) == "csr_attention/scalar"
    op, isa = fiak_ext.which_kernel("prior_attention", torch.float32, "cpu").split("/")
    assert op == "prior_attention" and isa in ("scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16")
    assert fiak_ext.which_kernel("compact_kv", torch.float32) == "compact_kv/scalar"
    with pytest.raises(ValueError, match=r"op must be one of prior_attention, .* \(got 'softmax'\)"):
        fiak_ext.which_kernel("softmax", torch.float32)
    with pytest.raises(ValueError, match="int64"):
        fiak_ext.which_kernel("csr_attention", torch.int64)
    with pytest.raises(ValueError, match=r"device must be .* kernels of csr_attention for \(got meta\)"):
        fiak_ext.which_kernel("csr_attention", torch.float32, "meta")
    if fiak_ext.build_info()["cuda"] is None:
        with pytest.raises(ValueError, match=r"device must be .* kernels of prior_attention for \(got cuda\)"):
            fiak_ext.which_kernel("prior_attention", torch.float16, "cuda")
    else:
        for op in ("prior_attention", "csr_attention", "compact_kv", "compact_linear"):
            assert fiak_ext.which_kernel(op, torch.float16, "cuda") == f"{op}/cuda"
        for op in ("prior_attention", "csr_attention"):
            with pytest.raises(ValueError, match=rf"dtype must not be torch\.float64 for {op} on CUDA"):
                fiak_ext.which_kernel(op, torch.float64, "cuda")


def test_everything_public_is_there() -> None:
    assert all(hasattr(fiak_ext, name) for name in fiak_ext.__all__)
