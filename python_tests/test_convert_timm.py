"""What ``convert`` does with timm: Swin's windows, and the parts of vision transformers that few models use."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from converted import BATCH, priors
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fiak_ext import PriorAttention, SparsePattern, calibrate, compact, convert, prune, resize_priors


def swin(img_size: int = 16) -> Any:
    """Windows of 2x2 of 4x4 patches, then one window of 2x2: blocks with and without a shift."""
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=5,
        img_size=img_size,
        embed_dim=8,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=2,
    )
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def images() -> Tensor:
    return torch.randn(BATCH, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class MaskedWindowAttention(WindowAttention):
    """timm's forward pass without fused attention, and with ``allowed`` bool ``[windows, heads, N, N]``."""

    allowed: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.scale * query @ key.mT + self._get_rel_pos_bias()
        windows = len(self.allowed)
        scores = scores.unflatten(0, (-1, windows))
        if mask is not None:
            scores = scores + mask[:, None]
        scores = scores.masked_fill(~self.allowed, -torch.inf).flatten(0, 1)
        return self.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


def test_swin_with_uniform_priors_is_the_original() -> None:
    model = swin()
    converted = convert(copy.deepcopy(model))
    assert [attention.groups for attention in priors(converted)] == [1, 4, 1, 1]
    torch.testing.assert_close(converted(images()), model(images()))
    model(images()).square().sum().backward()
    converted(images()).square().sum().backward()
    expected, got = gradients(model), gradients(converted)
    assert any("relative_position_bias_table" in name for name in expected)
    torch.testing.assert_close({name: got[name] for name in expected}, expected)


@pytest.mark.parametrize("compacted", [False, True])
def test_pruned_swin_is_the_original_with_the_same_mask(compacted: bool) -> None:
    """Also where all pairs that are left are between parts of a shifted window, so that each has -100."""
    model = swin()
    converted = convert(copy.deepcopy(model))
    generator = torch.Generator().manual_seed(2)
    attentions = [module for module in model.modules() if isinstance(module, WindowAttention)]
    for attention, original in zip(priors(converted), attentions, strict=True):
        shape = (attention.groups, attention.num_heads, attention.num_queries, attention.num_keys)
        mask = torch.rand(shape, generator=generator) < 0.5
        mask[..., 3] = True
        mask[..., 1] = False
        if attention.groups == 4:
            mask[3, :, 0] = torch.tensor([False, False, False, True])
        attention.set_pattern(SparsePattern.from_mask(mask))
        original.__class__, original.allowed = MaskedWindowAttention, mask
    if compacted:
        compact(converted)
        assert all(attention.keep is not None and attention.keep.size(1) == 3 for attention in priors(converted))
    expected, output = model(images()), converted(images())
    torch.testing.assert_close(output, expected)
    expected.square().sum().backward()
    output.square().sum().backward()
    torch.testing.assert_close(gradients(converted), gradients(model))


def distance(x: Tensor, expected: Tensor) -> float:
    """Between two tensors, as a share of the second's norm."""
    return float((x.float() - expected.float()).norm() / expected.float().norm())


def masked(original: nn.Module, masks: list[Tensor], x: Tensor) -> Tensor:
    """The output of the original model with a mask of each layer, bool ``[windows, heads, N, N]``."""
    for module in original.modules():
        if isinstance(module, WindowAttention):
            module.__class__, module.allowed = MaskedWindowAttention, masks.pop(0)
        elif isinstance(module, Block):
            mask = masks.pop(0)
            module.register_forward_pre_hook(
                lambda _, args, kwargs, mask=mask: (args, {**kwargs, "attn_mask": mask}), with_kwargs=True
            )
    output: Tensor = original(x)
    return output


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_models_of_real_size(name: str) -> None:
    """Converted, pruned and compacted, forward and gradients, against dense attention with the same masks."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 224, 224)
    converted = convert(copy.deepcopy(model))
    with torch.no_grad():
        dense = model(x)
        assert distance(converted(x), dense) < 1e-5
    masks = []
    for attention in priors(converted):
        shape = (attention.groups, attention.num_heads, attention.num_queries, attention.num_keys)
        mask = (torch.rand(shape) < 0.3) | torch.eye(shape[-1], dtype=torch.bool)
        mask[..., 1] = False
        masks.append(mask)
        attention.set_pattern(SparsePattern.from_mask(mask))
    assert len(masks) == 12
    expected = masked(model, masks, x)
    assert distance(expected, dense) > 1e-3
    expected.square().sum().backward()
    wanted = gradients(model)
    compacted = compact(copy.deepcopy(converted))
    assert all(attention.keep is not None for attention in priors(compacted))
    for candidate in (converted, compacted):
        output = candidate(x)
        assert distance(output, expected) < 1e-5
        output.square().sum().backward()
        got = gradients(candidate)
        assert got.keys() == wanted.keys()
        assert distance(*(torch.cat([grads[name].flatten() for name in wanted]) for grads in (got, wanted))) < 1e-5


@pytest.mark.parametrize("state", ["dense", "pruned", "compacted"])
def test_swin_stays_a_first_class_citizen(state: str) -> None:
    model, x = convert(swin().float()), images().float()
    if state != "dense":
        prune(model, 0.5, keys=0.25, importance="random", generator=torch.Generator().manual_seed(0))
    if state == "compacted":
        compact(model)

    def step(module: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        output = module(x)
        output.float().square().mean().backward()
        return output.detach(), gradients(model)

    expected = step(model)
    torch.compiler.reset()
    torch.testing.assert_close(step(torch.compile(model, fullgraph=True, backend="aot_eager")), expected)
    exported = torch.export.export(copy.deepcopy(model), (x,)).module()
    torch.testing.assert_close(exported(x), expected[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, grads = step(model)
    assert distance(output, expected[0]) < 0.1
    assert all(grad.dtype == torch.float32 and bool(grad.isfinite().all()) for grad in grads.values())
    low = copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert distance(low, expected[0]) < 0.1
    assert torch.equal(model(x), expected[0])  # which its copy left alone
    model.set_grad_checkpointing()
    torch.testing.assert_close(step(model), expected)


def test_swin_is_calibrated_by_the_attention_that_it_pays() -> None:
    model = swin()
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, WindowAttention):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(lambda _, args, output, name=name: seen.update({name: args[0]}))
    batch = images()
    model(batch)
    converted = convert(swin(), kind="softmax")
    converted.load_state_dict(model.state_dict())
    calibrate(converted, [batch])
    assert len(seen) > 1
    for name, attention in seen.items():
        prior = converted.get_submodule(name).prior_attention
        expected = attention.unflatten(0, (-1, prior.groups)).mean(0)
        torch.testing.assert_close(prior.posterior, expected.float())


def test_pairs_between_parts_of_a_shifted_window_cost_nothing_to_prune() -> None:
    converted = convert(swin(), kind="softmax")
    shifted = next(module for module in priors(converted) if module.groups == 4)
    between = converted.layers[0].blocks[1].attn_mask == -100
    expected = converted(images())
    calibrate(converted, [images()])
    assert shifted.reached is not None
    assert torch.equal(shifted.reached == 0, between[:, None].expand(-1, shifted.num_heads, -1, -1))
    model = copy.deepcopy(converted)
    report = prune(model, 0.0, importance="posterior")
    assert report.unreached == shifted.num_heads * int(between.sum()) > 0 and report.pruned == 0
    assert report.pairs == sum(layer.pairs for layer in report.layers)
    torch.testing.assert_close(model(images()), expected)  # without these pairs, and with all others
    layer = prune(converted, 0.5, importance="posterior").layers[1]
    visible = shifted.num_heads * int((~between).sum())
    assert (layer.pairs, layer.pruned, layer.kept) == (visible, visible // 2, visible - visible // 2)
    assert shifted.pattern is not None and not bool((shifted.pattern.to_mask() & between[:, None]).any())


def test_what_swin_refuses() -> None:
    with pytest.raises(ValueError, match="num_tokens must be 4, as in the model, or be left out"):
        convert(swin(), num_tokens=3)
    with pytest.raises(ValueError, match="WindowAttention, which must be in a SwinTransformerBlock"):
        convert(swin().layers[0].blocks[0].attn)
    converted = convert(swin())
    expected = converted(images())
    for size in ((32, 32), (8, 32), (16, 16)):  # the second has as many windows
        with pytest.raises(ValueError, match="set_input_size must come before convert"):
            converted.set_input_size(size, window_size=2)
    torch.testing.assert_close(converted(images()), expected)
    block = converted.layers[0].blocks[1]
    with pytest.raises(ValueError, match=r"mask must have 4 windows, as at conversion \(got 1\)"):
        block.attn(torch.randn(1, 4, 8, dtype=torch.float64))


def test_normalised_and_gated_attention() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        Attention(16, 4, qkv_bias=False, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm, gated=True)
    ).double()
    converted = convert(copy.deepcopy(model), num_tokens=6)
    x = torch.randn(BATCH, 6, 16, dtype=torch.float64)
    torch.testing.assert_close(converted(x), model(x))
    prune(converted, keys=0.5, importance="random")
    expected = converted(x)
    torch.testing.assert_close(compact(converted)(x), expected)
    with pytest.raises(ValueError, match="attn_mask must be None and is_causal False"):
        converted[0](x, is_causal=True)


def test_attention_of_timm_that_is_not_supported_is_named() -> None:
    model = timm.create_model("beit_base_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"got blocks\.0\.attn: timm\.models\.beit\.Attention, for which nothing"):
        convert(model)
    pooled = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, global_pool="map",
        class_token=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"got attn_pool: timm\.layers\.attention_pool\.AttentionPoolLatent, for"):
        convert(pooled)


def test_dropout_of_attention() -> None:
    torch.manual_seed(0)
    converted = convert(nn.Sequential(Attention(16, 4, attn_drop=0.5)), num_tokens=6)
    x = torch.randn(BATCH, 6, 16)
    assert not torch.equal(converted(x), converted(x))
    converted.eval()
    assert torch.equal(converted(x), converted(x))


# ---------------------------------------------------------------- images of another size


def vit(kind: str = "fiak") -> Any:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=4
    )
    return convert(model.double().eval(), kind=kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["fiak", "gmm", "softmax"])
def test_priors_follow_the_size_of_images(kind: str) -> None:
    converted = vit(kind)
    original = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=4
    )
    original.double().eval().load_state_dict(converted.state_dict(), strict=False)
    larger = torch.randn(BATCH, 3, 24, 20, dtype=torch.float64)
    original.set_input_size((24, 20))
    with pytest.raises(AssertionError, match="Input height"):
        converted(larger)
    converted.set_input_size((24, 20))
    assert resize_priors(converted, (4, 4), (6, 5)) is converted
    assert {attention.num_queries for attention in priors(converted)} == {31}
    torch.testing.assert_close(converted(larger), original(larger))  # uniform priors stay uniform


def test_priors_are_interpolated_along_queries_and_keys() -> None:
    attention = PriorAttention(2, 1 + 12).double()
    assert attention.prior is not None
    rows, columns = torch.randn(2, 13, dtype=torch.float64).unbind(0)
    attention.prior.data = (rows[:, None] + columns).expand(1, 2, -1, -1).clone()

    def resized(x: Tensor) -> Tensor:
        grid = x[1:].view(1, 1, 3, 4)
        patches = nn.functional.interpolate(grid, (5, 2), mode="bicubic", antialias=True)
        return torch.cat([x[:1], patches.flatten()])

    resize_priors(attention, (3, 4), (5, 2))
    torch.testing.assert_close(attention.prior[0, 1], resized(rows)[:, None] + resized(columns))
    before = attention.prior.clone()
    torch.testing.assert_close(resize_priors(attention, (5, 2), (5, 2)).prior, nn.Parameter(before))


def test_calibration_goes_with_the_size_it_belongs_to() -> None:
    converted = vit()
    calibrate(converted, [images()])
    calibrate(converted, [images()], importance="gradient", forward=lambda model, batch: model(batch).square().sum())
    converted.set_input_size((24, 20))
    for attention in priors(converted):
        assert attention.posterior is None and attention.reached is None and attention.saliency is None


def test_what_resizing_refuses() -> None:
    with pytest.raises(ValueError, match="model must hold PriorAttention modules"):
        resize_priors(nn.Linear(2, 2), (2, 2), (3, 3))
    converted = vit()
    for grid, new_grid, message in (
        ((3, 4), (5, 5), r"grid must be that of all"),
        ((4, 4), (0, 4), r"at least one row"),
    ):
        with pytest.raises(ValueError, match=message):
            resize_priors(converted, grid, new_grid)
    prune(converted, 0.5, importance="random")
    with pytest.raises(ValueError, match=r"model must not be pruned \(got 'blocks\.0\.attn\.prior_attention' pruned"):
        resize_priors(converted, (4, 4), (5, 5))


# ---------------------------------------------------------------- patches that are not where the priors are


def flexible(**arguments: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"num_classes": 5, "img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **arguments}).double().eval()


def in_state(model: Any, state: str) -> Any:
    if state == "softmax":
        return convert(model, kind="softmax")
    convert(model)
    if state != "dense":
        prune(model, 0.5, importance="random", generator=torch.Generator().manual_seed(0))
    return compact(model) if state == "compacted" else model


@pytest.mark.parametrize("state", ["dense", "pruned", "compacted"])
@pytest.mark.parametrize("size", [(8, 32), (32, 8), (8, 8), (16, 12)])
def test_images_of_another_grid_are_refused(state: str, size: tuple[int, int]) -> None:
    """Also where it has as many patches; images of the grid of the priors are taken."""
    original = flexible(dynamic_img_size=True)
    model = in_state(copy.deepcopy(original), state)
    if state == "dense":
        torch.testing.assert_close(model(images()), original(images()))
    other = torch.randn(BATCH, 3, *size, dtype=torch.float64)
    for run in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=r"images must have \(4, 4\) patches, .* call model\.set_input_size"):
            run(other)


def test_images_that_are_padded_to_the_grid_are_taken() -> None:
    original = flexible(dynamic_img_size=True, dynamic_img_pad=True)
    model = convert(copy.deepcopy(original))
    padded, larger = images()[..., :15, :13], torch.randn(BATCH, 3, 15, 17, dtype=torch.float64)
    torch.testing.assert_close(model(padded), original(padded))
    with pytest.raises(
        ValueError, match=r"images must have \(4, 4\) patches, as priors and patterns have \(got \(4, 5"
    ):
        model(larger)


def test_softmax_attention_takes_any_grid_but_is_not_calibrated_by_two() -> None:
    original = flexible(dynamic_img_size=True)
    model = in_state(copy.deepcopy(original), "softmax")
    for size in ((8, 32), (8, 12), (16, 16)):
        other = torch.randn(BATCH, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(model(other), original(other))
        if size != (16, 16):
            for batches in ([images(), other], [other, images()], [other]):
                with pytest.raises(ValueError, match=r"images must have \(4, 4\) patches"):
                    calibrate(model, batches)
    assert all(attention.posterior is None for attention in priors(model))


def test_images_whose_grid_is_not_checked_are_refused() -> None:
    model = convert(flexible())
    expected = model(images())
    model.patch_embed.strict_img_size = False
    for size in ((8, 32), (16, 16), (8, 8)):
        with pytest.raises(ValueError, match=r"patch_embed\.strict_img_size must be True unless dynamic_img_size is"):
            model(torch.randn(BATCH, 3, *size, dtype=torch.float64))
    model.patch_embed.strict_img_size = True
    torch.testing.assert_close(model(images()), expected)


@pytest.mark.parametrize("state", ["dense", "pruned", "compacted", "softmax"])
def test_dropped_patches_are_refused_in_training(state: str) -> None:
    model = in_state(flexible(patch_drop_rate=0.5), state)
    expected = model(images())
    model.train()
    if state == "softmax":
        assert bool(model(images()).isfinite().all())
        return
    with pytest.raises(
        ValueError, match=r"patch_drop must be off .*got a rate of 0.5 in training.*torch\.nn\.Identity"
    ):
        model(images())
    model.patch_drop.prob = 0.0
    torch.testing.assert_close(model(images()), expected)
    model.patch_drop = nn.Identity()
    torch.testing.assert_close(model(images()), expected)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_base_patch16_gap_224"]
)
@pytest.mark.parametrize("arguments", [{"img_size": (24, 20)}, {"img_size": (8, 32)}, {"patch_size": (2, 4)}])
def test_set_input_size_resizes_priors(name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {"num_classes": 5, "img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4}
    original = timm.create_model(name, **sizes).double().eval()
    model = convert(copy.deepcopy(original))
    before = copy.deepcopy(priors(model)[0])
    assert before.prior is not None
    priors(model)[0].prior.data.copy_(before.prior.data.normal_())  # type: ignore[union-attr]
    twin, expected = copy.deepcopy(model), copy.deepcopy(original)
    expected.set_input_size(**arguments)
    model.set_input_size(**arguments)
    grid = model.patch_embed.grid_size
    resize_priors(before, (4, 4), grid, num_prefix_tokens=model.num_prefix_tokens)
    torch.testing.assert_close(priors(model)[0].prior, before.prior)
    resize_priors(model, (4, 4), grid, num_prefix_tokens=model.num_prefix_tokens)  # nothing is left to do
    torch.testing.assert_close(priors(model)[0].prior, before.prior)
    resize_priors(twin, (4, 4), grid, num_prefix_tokens=model.num_prefix_tokens)  # in the other order
    with pytest.raises(ValueError, match="images must have"):
        twin(images())
    twin.set_input_size(**arguments)
    x = torch.randn(BATCH, 3, *model.patch_embed.img_size, dtype=torch.float64)
    torch.testing.assert_close(twin(x), model(x))
    for attention in priors(model):
        attention.reset_parameters()
    torch.testing.assert_close(model(x), expected(x))


def test_set_input_size_of_a_pruned_model_is_refused() -> None:
    for state in ("pruned", "compacted"):
        model = in_state(flexible(), state)
        expected = model(images())
        for arguments in ({"img_size": (24, 20)}, {"img_size": (8, 32)}, {"patch_size": 8}):
            with pytest.raises(ValueError, match=r"resize_priors: model must not be pruned"):
                model.set_input_size(**arguments)
        torch.testing.assert_close(model(images()), expected)
        model.set_input_size((16, 16))
        torch.testing.assert_close(model(images()), expected)


def test_other_models_with_patches_anywhere_are_refused() -> None:
    from timm.models.vision_transformer import VisionTransformer

    class Derived(VisionTransformer):
        pass

    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    convert(Derived(**sizes))
    for flexibility in ({"dynamic_img_size": True}, {"patch_drop_rate": 0.5}):
        with pytest.raises(ValueError, match="dynamic_img_size and patch_drop must be off in Derived"):
            convert(Derived(**sizes, **flexibility))
    naflex = timm.create_model("naflexvit_base_patch16_gap", embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="which is in a NaFlexVit, whose patches have places of their own"):
        convert(naflex, num_tokens=64)
