"""Small models of other libraries, with random weights, for the tests of ``convert``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fiak_ext import PriorAttention, SparsePattern, convert

BATCH, DIM, HEADS, DEPTH, VOCABULARY = 3, 16, 4, 2, 31


@dataclass(frozen=True)
class Case:
    """A model and how to run it.

    Attributes:
        name: of the case.
        make: the model, in float32.
        inputs: of a batch, as keyword arguments.
        run: the output of a model for inputs.
        run_masked: the same of the original model with a mask bool ``[heads, n, n]`` in all its attention.
        num_tokens: what ``convert`` is to be told.
        tokens: how many the inputs have.
        is_causal: of the attention.
    """

    name: str
    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    run: Callable[[nn.Module, dict[str, Any]], Tensor]
    run_masked: Callable[[nn.Module, dict[str, Any], Tensor], Tensor]
    num_tokens: int | None
    tokens: int
    is_causal: bool = False

    def model(self, dtype: torch.dtype = torch.float64) -> Any:
        """The model with random weights, the same at every call, without dropout."""
        torch.manual_seed(0)
        model = self.make().to(dtype).eval()
        for parameter in model.parameters():  # the libraries' own are so small that attention is all but uniform
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.3)
        return model

    def converted(self, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Any:
        if self.name == "torch.nn causal":
            kwargs["is_causal"] = True
        return convert(self.model(dtype), num_tokens=self.num_tokens, **kwargs)

    def mask(self) -> Tensor:
        """bool ``[heads, num_tokens, num_tokens]``: the diagonal always, one key of each head by its own query only."""
        size = self.num_tokens or self.tokens
        mask = torch.rand((HEADS, size, size), generator=torch.Generator().manual_seed(1)) < 0.5
        for head in range(HEADS):
            mask[head, :, head + 1] = False
        mask |= torch.eye(size, dtype=torch.bool)
        return mask.tril() if self.is_causal else mask

    def pruned(self, dtype: torch.dtype = torch.float64, mask: Tensor | None = None) -> Any:
        model = self.converted(dtype)
        for attention in priors(model):
            attention.set_pattern(SparsePattern.from_mask(self.mask() if mask is None else mask))
        return model


def priors(model: nn.Module) -> list[PriorAttention]:
    return [module for module in model.modules() if isinstance(module, PriorAttention)]


def left_out(mask: Tensor) -> Tensor:
    """The mask without key 1 of all heads, its own query included, so that ``compact`` has something to drop."""
    mask = mask.clone()
    mask[:, :, 1] = False
    return mask


def token_ids(tokens: int) -> Tensor:
    return torch.randint(2, VOCABULARY, (BATCH, tokens), generator=torch.Generator().manual_seed(2))


def images(size: int) -> Tensor:
    return torch.randn((BATCH, 3, size, size), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face transformers


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=DIM,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            intermediate_size=24,
            max_position_embeddings=32,
        )
    )


def _roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(
        RobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=DIM,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            intermediate_size=24,
            max_position_embeddings=32,
        )
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=32,
            n_embd=DIM,
            n_layer=DEPTH,
            n_head=HEADS,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=DIM,
            intermediate_size=24,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(
            hidden_size=DIM,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            intermediate_size=24,
            image_size=16,
            patch_size=4,
        )
    )


def _run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    output: Tensor = model(**inputs)[0]
    return output


def _run_with_mask(model: nn.Module, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    mask = mask.expand(BATCH, -1, -1, -1)
    if (visible := inputs.get("attention_mask")) is not None:
        mask = mask & visible.bool()[:, None, None]
    return _run(model, {**inputs, "attention_mask": mask})


def _run_vit_with_mask(model: nn.Module, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    return _hooked(model, "ViTAttention", "attention_mask", mask[None], lambda: _run(model, inputs))


def _hooked(model: nn.Module, name: str, argument: str, value: Any, run: Callable[[], Tensor]) -> Tensor:
    """Runs with one argument of all modules of a class replaced; their other arguments as they are."""
    import inspect

    def replace(module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        bound.update(bound.pop("kwargs", {}))
        return (), {**bound, argument: value}

    handles = [
        module.register_forward_pre_hook(replace, with_kwargs=True)
        for module in model.modules()
        if type(module).__name__ == name
    ]
    assert handles
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------------------------------------------------------
# torch.nn


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 24, batch_first=True)
    return nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=True)


def _sequence() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    return {"src": torch.randn((BATCH, 8, DIM), generator=generator, dtype=torch.float64)}


def _causal_sequence() -> dict[str, Any]:
    return {**_sequence(), "mask": nn.Transformer.generate_square_subsequent_mask(8).double(), "is_causal": True}


def _run_encoder(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    dtype = next(model.parameters()).dtype
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    output: Tensor = model(**inputs)
    return output


def _run_encoder_with_mask(model: nn.Module, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    hidden = ~mask.repeat(BATCH, 1, 1)
    return _run_encoder(model, {**inputs, "mask": hidden, "is_causal": False})


# ---------------------------------------------------------------------------------------------------------------------
# timm


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(
            name, num_classes=5, img_size=16, patch_size=4, embed_dim=DIM, depth=DEPTH, num_heads=HEADS
        )
        return model

    return make


def _run_images(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    output: Tensor = model(**{name: x.to(next(model.parameters()).dtype) for name, x in inputs.items()})
    return output


def _run_images_with_mask(model: nn.Module, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    output: Tensor = model(**inputs, attn_mask=mask)
    return output


def _run_pixels(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return _run(model, {name: x.to(next(model.parameters()).dtype) for name, x in inputs.items()})


def _text(name: str, make: Callable[[], nn.Module], is_causal: bool = False) -> Case:
    return Case(name, make, lambda: {"input_ids": token_ids(8)}, _run, _run_with_mask, 8, 8, is_causal)


CASES = {
    case.name: case
    for case in (
        Case("torch.nn", _encoder, _sequence, _run_encoder, _run_encoder_with_mask, 8, 8),
        Case("torch.nn causal", _encoder, _causal_sequence, _run_encoder, _run_encoder_with_mask, 8, 8, True),
        _text("bert", _bert),
        _text("roberta", _roberta),
        _text("gpt2", _gpt2, True),
        _text("llama", _llama, True),
        Case("vit", _vit, lambda: {"pixel_values": images(16)}, _run_pixels, _run_vit_with_mask, None, 17),
        *(
            Case(name, _timm(name), lambda: {"x": images(16)}, _run_images, _run_images_with_mask, None, tokens)
            for name, tokens in (
                ("vit_tiny_patch16_224", 17),
                ("deit_tiny_distilled_patch16_224", 18),
                ("vit_base_patch16_gap_224", 16),
            )
        ),
    )
}
