"""What ``convert`` does with Hugging Face transformers: padding, cached decoding, masks, saving and loading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from converted import BATCH, CASES, HEADS, VOCABULARY, Case, priors, token_ids
from torch import Tensor

from fiak_ext import compact, convert, prune

TEXT = [CASES[name] for name in ("bert", "roberta", "gpt2", "llama")]
CAUSAL = [case for case in TEXT if case.is_causal]
every_text = pytest.mark.parametrize("case", TEXT, ids=lambda case: case.name)
every_causal = pytest.mark.parametrize("case", CAUSAL, ids=lambda case: case.name)


def lengths_and_mask(left: bool) -> tuple[list[int], Tensor]:
    lengths = torch.tensor([8, 5, 1])
    mask = torch.arange(8) < lengths[:, None]
    return lengths.tolist(), (mask.flip(1) if left else mask).long()


def positions(mask: Tensor) -> Tensor:
    """As ``generate`` gives them to models with left-padded inputs."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def in_state(case: Case, state: str) -> Any:
    model = case.converted() if state == "dense" else case.pruned()
    return compact(model) if state == "compacted" else model


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("state", ["dense", "pruned", "compacted"])
@every_text
def test_padding_on_either_side(case: Case, state: str, left: bool) -> None:
    """Each element gives what the original gives for its tokens alone, with the first rows and columns of the mask."""
    lengths, attention_mask = lengths_and_mask(left)
    inputs = {"input_ids": token_ids(8), "attention_mask": attention_mask}
    if case.name != "roberta":  # which numbers positions by itself, by padding tokens
        inputs["position_ids"] = positions(attention_mask)
    extra = {"use_cache": False} if case.is_causal else {}
    model, converted = case.model(), in_state(case, state)
    pattern = torch.ones_like(case.mask()) if state == "dense" else case.mask()
    pattern = pattern.tril() if case.is_causal else pattern
    output = converted(**inputs, **extra)[0]
    output[attention_mask.bool()].square().sum().backward()
    for element, length in enumerate(lengths):
        tokens = inputs["input_ids"][element, attention_mask[element].bool()][None]
        ids = {}
        if case.name == "roberta":
            places = torch.arange(8)[attention_mask[element].bool()] + 2
            ids = {"position_ids": places[None]}
        mask = pattern[None, :, :length, :length]
        expected = model(input_ids=tokens, attention_mask=mask, **ids, **extra)[0]
        torch.testing.assert_close(output[element, attention_mask[element].bool()][None], expected)
        expected.square().sum().backward()
    expected_grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    grads = {name: p.grad for name, p in converted.named_parameters() if name in expected_grads}
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("state", ["dense", "pruned", "compacted"])
@every_causal
def test_cached_decoding_equals_the_full_pass(case: Case, state: str) -> None:
    """Token by token and in chunks, with elements of different lengths, padded on the left as ``generate`` does."""
    converted = in_state(case, state)
    _, attention_mask = lengths_and_mask(left=True)
    ids, places = token_ids(8), positions(attention_mask)
    with torch.no_grad():
        full = converted(input_ids=ids, attention_mask=attention_mask, position_ids=places, use_cache=False)[0]
        for chunks in ([1] * 8, [3, 1, 4], [8]):
            cache, start, parts = None, 0, []
            for chunk in chunks:
                stop = start + chunk
                output = converted(
                    input_ids=ids[:, start:stop],
                    attention_mask=attention_mask[:, :stop],
                    position_ids=places[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache, start = output.past_key_values, stop
                parts.append(output.logits)
            visible = attention_mask.bool()
            torch.testing.assert_close(torch.cat(parts, 1)[visible], full[visible])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@every_causal
def test_generation(case: Case, cache: str) -> None:
    _, attention_mask = lengths_and_mask(left=True)
    model, converted = case.model(), convert(case.model(), num_tokens=14)
    arguments: dict[str, Any] = {
        "attention_mask": attention_mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    expected = model.generate(token_ids(8), **arguments)
    assert expected.shape == (BATCH, 14)
    assert torch.equal(converted.generate(token_ids(8), **arguments), expected)


def test_masks_that_are_not_padding_are_refused() -> None:
    bert = CASES["bert"].converted()
    ids, mask = token_ids(8), torch.ones(BATCH, 8)
    mask[1, 3] = 0
    with pytest.raises(ValueError, match="attention_mask must hide tokens at the ends only"):
        bert(input_ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, keys\], .*got torch.bool, shape \(3, 1"):
        bert(input_ids=ids, attention_mask=torch.ones(BATCH, 1, 8, 8, dtype=torch.bool))
    llama = CASES["llama"].converted()
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).expand(BATCH, -1)
    with pytest.raises(ValueError, match="got a sliding window, packed sequences or another mask"):
        llama(input_ids=ids, position_ids=packed, use_cache=False)


def test_an_element_without_tokens_gives_no_nan() -> None:
    bert = CASES["bert"].converted()
    mask = torch.ones(BATCH, 8)
    mask[1] = 0
    assert bool(bert(input_ids=token_ids(8), attention_mask=mask)[0].isfinite().all())


def test_what_changes_after_conversion_is_refused() -> None:
    bert = CASES["bert"].converted().train()
    bert.encoder.layer[1].attention.self.dropout.p = 0.5
    with pytest.raises(ValueError, match=r"dropout must be 0.1, as at conversion \(got 0.5\)"):
        bert(input_ids=token_ids(8))
    bert.eval().encoder.layer[1].attention.self.scaling = 1.0
    with pytest.raises(ValueError, match=r"scaling must be 0.5, as at conversion \(got 1.0\)"):
        bert(input_ids=token_ids(8))


def test_cross_attention_is_refused() -> None:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(**sizes, intermediate_size=8, is_decoder=True, add_cross_attention=True))
    with pytest.raises(ValueError, match=r"layer\.0\.crossattention\.self: transformers\S+BertCrossAttention, for"):
        convert(bert, num_tokens=4)
    gpt2 = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=VOCABULARY, add_cross_attention=True))
    with pytest.raises(ValueError, match=r"got h\.0\.crossattention: GPT2Attention, which is cross-attention"):
        convert(gpt2, num_tokens=4)
    assert gpt2.config._attn_implementation == "sdpa"


def test_a_configuration_is_not_shared_with_models_that_are_not_converted() -> None:
    from transformers import BertModel

    model = CASES["bert"].model()
    twin = BertModel(model.config).double().eval()
    twin.load_state_dict(model.state_dict())
    converted = convert(model, num_tokens=8)
    assert twin.config._attn_implementation == "sdpa" and converted.config._attn_implementation == "fiak"
    assert all(module.config is converted.config for module in converted.modules() if hasattr(module, "config"))
    torch.testing.assert_close(twin(token_ids(8))[0], converted(token_ids(8))[0])
    twin.config._attn_implementation = "fiak"
    with pytest.raises(ValueError, match=r"module must be one that convert put priors into \(got BertSelfAttention\)"):
        twin(token_ids(8))


def test_training_uses_dropout_of_the_library() -> None:
    bert = CASES["bert"].converted().train()
    assert [attention.dropout_p for attention in priors(bert)] == [0.1, 0.1]
    for module in bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    first, second = (bert(token_ids(8))[0] for _ in range(2))
    assert not torch.equal(first, second)


@every_text
def test_prune_by_priors_after_a_training_step(case: Case) -> None:
    converted = case.converted(torch.float32)
    optimizer = torch.optim.SGD(converted.parameters(), 0.1)
    converted(token_ids(8))[0].square().sum().backward()
    optimizer.step()
    report = prune(converted, 0.5)
    assert report.pairs == 2 * HEADS * (36 if case.is_causal else 64)
    assert bool(converted(token_ids(8))[0].isfinite().all())
