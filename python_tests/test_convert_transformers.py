"""What ``convert`` does with Hugging Face transformers: padding, cached decoding, masks, saving and loading."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from converted import BATCH, CASES, DEPTH, DIM, HEADS, VOCABULARY, Case, images, left_out, priors, token_ids
from counting import BytesMade
from torch import Tensor
from transformers.models.bert import modeling_bert

from fiak_ext import SparsePattern, compact, conversion, convert, flops, prune, resize_priors

TEXT = [CASES[name] for name in ("bert", "roberta", "gpt2", "llama")]
CAUSAL = [case for case in TEXT if case.is_causal]
ALL = [*TEXT, CASES["vit"]]
every_case = pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
every_state = pytest.mark.parametrize("state", ["dense", "pruned", "compacted"])
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


# ---------------------------------------------------------------------------------------------------------------------
# What the library is told after conversion


def with_own_attention(case: Case, state: str) -> Any:
    """A converted model whose attention is not plain softmax attention, dense or not."""
    model = in_state(case, state)
    for attention in priors(model):
        if attention.prior is not None:
            torch.nn.init.normal_(attention.prior)
    return model


def give_a_new_configuration(model: Any) -> None:
    """A configuration as that of the original, in the model only, which is what chooses the mask."""
    import copy

    base = getattr(model, model.base_model_prefix, model)
    base.config = copy.deepcopy(base.config)
    base.config._attn_implementation = "sdpa"


def set_config(name: str) -> Any:
    return lambda model: setattr(model.config, "_attn_implementation", name)


OTHER_ATTENTION = {
    "set_attn_implementation sdpa": lambda model: model.set_attn_implementation("sdpa"),
    "set_attn_implementation eager": lambda model: model.set_attn_implementation("eager"),
    "config sdpa": set_config("sdpa"),
    "config eager": set_config("eager"),
    "config flash": set_config("flash_attention_2"),
    "config flex": set_config("flex_attention"),
    "another config": give_a_new_configuration,
}


@pytest.mark.parametrize("way", OTHER_ATTENTION)
@every_state
@every_case
@torch.no_grad()
def test_another_attention_implementation_is_refused_or_changes_nothing(case: Case, state: str, way: str) -> None:
    model = with_own_attention(case, state)
    expected = case.run(model, case.inputs())
    try:
        OTHER_ATTENTION[way](model)
        output = case.run(model, case.inputs())
    except (ValueError, RuntimeError) as error:
        assert "implementation" in str(error) or "attention_mask" in str(error)
    else:
        torch.testing.assert_close(output, expected)
    if way != "another config":
        model.set_attn_implementation("fiak")
        assert torch.equal(case.run(model, case.inputs()), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_causal
@torch.no_grad()
def test_another_mask_with_padding_or_a_cache_is_refused(case: Case, attention: str) -> None:
    """The model makes the mask by its own configuration, and gives it to attention that has kept the right one."""
    import copy

    ids, (_, mask) = token_ids(8), lengths_and_mask(left=True)
    for state in ("dense", "pruned", "compacted"):
        model = with_own_attention(case, state)
        base = getattr(model, model.base_model_prefix)
        base.config = copy.deepcopy(base.config)
        base.config._attn_implementation = attention
        with pytest.raises(ValueError, match="attention_mask must be"):
            model(ids, attention_mask=mask, use_cache=False)
        base.config._attn_implementation = "fiak"
        cache = cache_of(model(ids[:, :7], use_cache=True))
        base.config._attn_implementation = attention
        with pytest.raises(ValueError, match="attention_mask must"):
            model(ids[:, 7:], past_key_values=cache)


def test_attention_implementations_before_conversion_do_not_matter() -> None:
    from transformers import LlamaForCausalLM

    case = CASES["llama"]
    config = case.model().config
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).double().eval()
    expected = case.run(model, case.inputs())
    torch.testing.assert_close(case.run(convert(model, num_tokens=8), case.inputs()), expected)


@every_state
@every_case
def test_output_attentions_is_refused(case: Case, state: str) -> None:
    model = with_own_attention(case, state)
    with pytest.raises(ValueError, match=r"output_attentions must be False, .*got True"):
        model(**case.inputs(), output_attentions=True)
    hidden = model(**case.inputs(), output_attentions=False, output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    with pytest.raises(ValueError, match="output_attentions"):  # transformers' own: the name is not "eager"
        model.config.output_attentions = True
    if case.is_causal:
        with pytest.raises(ValueError, match="output_attentions must be False"):
            model.generate(token_ids(4), max_new_tokens=1, output_attentions=True, return_dict_in_generate=True)


@every_case
def test_output_attentions_of_the_configuration_is_refused(case: Case) -> None:
    original = case.model()
    original.set_attn_implementation("eager")
    original.config.output_attentions = True
    assert len(original(**case.inputs()).attentions) == 2
    model = convert(original, num_tokens=case.num_tokens)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(**case.inputs())
    model.config.output_attentions = False
    case.run(model, case.inputs())


@every_state
@every_case
def test_arguments_that_attention_does_not_use_are_refused(case: Case, state: str) -> None:
    model = with_own_attention(case, state)
    expected = model(**case.inputs())[0]
    harmless = {"num_items_in_batch": torch.tensor(3), "output_router_logits": False, "cu_seq_lens_q": None}
    assert torch.equal(model(**case.inputs(), **harmless)[0], expected)
    for name, value in {
        "cu_seq_lens_q": torch.tensor([0, 8]),
        "max_length_k": 8,
        "seq_idx": torch.zeros(3, 8),
        "softcap": 30.0,
        "some_new_argument": False,
        "is_causal": not case.is_causal,
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            model(**case.inputs(), **{name: value})


@every_state
def test_what_changes_after_conversion_is_refused_in_every_state(state: str) -> None:
    for case in ALL:
        model = with_own_attention(case, state)
        for module in model.modules():
            if hasattr(module, "prior_attention"):
                module.scaling = 1.0
        with pytest.raises(ValueError, match=r"scaling must be 0.5, as at conversion \(got 1.0\)"):
            case.run(model, case.inputs())


def cache_of(output: Any) -> Any:
    """By the name that the installed transformers gives it: ``cache`` from 5.24 on."""
    return output.cache if "cache" in output else output.past_key_values


def name_the_cache(model: Any, name: str) -> None:
    """Attention of ``model`` gets its cache as transformers from 5.24 on passes it, or as those before."""

    def rename(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        values = [kwargs.pop(key) for key in ("cache", "past_key_values") if key in kwargs]
        return args, {**kwargs, name: values[0]}

    for module in model.modules():
        if hasattr(module, "prior_attention"):
            module.register_forward_pre_hook(rename, with_kwargs=True)


either_cache = pytest.mark.parametrize("name", ["cache", "past_key_values"])


@either_cache
@every_state
@every_causal
@torch.no_grad()
def test_both_names_of_the_cache_work(case: Case, state: str, name: str) -> None:
    model = with_own_attention(case, state)
    ids = token_ids(8)
    full = model(ids, use_cache=False).logits
    name_the_cache(model, name)
    first = model(ids[:, :5], use_cache=True)
    parts, cache = [first.logits], cache_of(first)
    for place in range(5, 8):
        output = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        parts.append(output.logits)
        cache = cache_of(output)
    torch.testing.assert_close(torch.cat(parts, 1), full)


@either_cache
@every_causal
def test_with_a_cache_pairs_alone_are_saved(case: Case, name: str) -> None:
    mask = left_out(case.mask())
    model, ids = compact(case.pruned(mask=mask)), token_ids(5)
    name_the_cache(model, name)
    pairs = 2 * 2 * (DIM // HEADS) * BATCH * DEPTH * (HEADS * 15 - int(mask[:, :5, :5].sum()))
    cached, without = (flops.model_report(model, ids, use_cache=use).attention for use in (True, False))
    assert cached.dense.torch - cached.now.torch == pairs
    assert without.dense.torch - without.now.torch > pairs  # the projections of the key that is left out, too


# ---------------------------------------------------------------------------------------------------------------------
# Images of another size


def pixels(height: int, width: int) -> Tensor:
    return torch.randn((BATCH, 3, height, width), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@every_state
@torch.no_grad()
def test_images_of_another_grid_are_refused(state: str) -> None:
    """4 x 4 patches at conversion. 17 pixels are 4 patches of 4, with a pixel left over."""
    model = with_own_attention(CASES["vit"], state)
    for height, width in ((32, 8), (8, 32), (64, 4), (8, 8), (12, 16), (16, 12), (32, 32)):
        grid = f"{height // 4} x {width // 4}"
        with pytest.raises(ValueError, match=f"images must have 4 x 4 patches, as the priors have .got {grid}"):
            model(pixels(height, width), interpolate_pos_encoding=True)
    expected = model(pixels(16, 16))[0]
    assert torch.equal(model(pixels(16, 16), interpolate_pos_encoding=True)[0], expected)
    assert model(pixels(17, 18), interpolate_pos_encoding=True)[0].shape == expected.shape


@every_state
def test_patches_that_are_missing_or_moved_are_refused(state: str) -> None:
    model = with_own_attention(CASES["vit"], state)
    attention, tokens = model.layers[0].attention, torch.randn((BATCH, 17, 16), dtype=torch.float64)
    assert attention(tokens)[0].shape == tokens.shape
    with pytest.raises(ValueError, match=r"hidden_states must have 17 tokens, .*got 16"):
        attention(tokens[:, 1:])
    mask = torch.ones(BATCH, 17)
    mask[1, 0] = 0
    with pytest.raises(ValueError, match="attention_mask must hide patches at the end only"):
        model(images(16), attention_mask=mask)


@torch.no_grad()
def test_resized_priors_take_images_of_the_new_grid() -> None:
    original, model = CASES["vit"].model(), resize_priors(CASES["vit"].converted(), (4, 4), (2, 6))
    x = pixels(8, 24)
    expected = original(x, interpolate_pos_encoding=True)[0]
    torch.testing.assert_close(model(x, interpolate_pos_encoding=True)[0], expected)  # the priors are uniform
    for size in ((16, 16), (24, 8), (16, 12)):
        with pytest.raises(ValueError, match="images must have 2 x 6 patches"):
            model(pixels(*size), interpolate_pos_encoding=True)


@every_text
def test_num_tokens_must_be_a_size(case: Case) -> None:
    values: list[Any] = [1.5, 8.0, "16", True, 0, -1, [8]]
    for value in values:
        model = case.model()
        with pytest.raises(ValueError, match=r"convert: num_tokens must be an integer of at least 1 \(got"):
            convert(model, num_tokens=value)
        assert not priors(model)
    size: Any = torch.tensor(8).numpy()[()]
    assert priors(convert(case.model(), num_tokens=size))[0].num_keys == 8


# ---------------------------------------------------------------------------------------------------------------------
# The cost of decoding


def decoding_model(case: Case, state: str, num_tokens: int) -> Any:
    kind: Any = state if state in ("fiak", "gmm", "softmax") else "softmax"
    model = convert(case.model(torch.float32), num_tokens=num_tokens, kind=kind)
    if state in ("pruned", "compacted"):
        for attention in priors(model):
            attention.set_pattern(SparsePattern.from_window(HEADS, num_tokens, window_size=(15, 0), is_causal=True))
    return compact(model) if state == "compacted" else model


@torch.no_grad()
def bytes_of_a_step(model: Any, cached: int, left: bool) -> int:
    """Of a second step from ``cached`` tokens on: what a first one makes and keeps, such as plans, is there by then."""
    ids = torch.randint(2, VOCABULARY, (2, cached + 2), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, : 3 * left] = 0
    cache = cache_of(model(ids[:, :cached], attention_mask=mask[:, :cached], use_cache=True))
    for end in (cached + 1, cached + 2):
        with BytesMade() as made:
            model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
    return made.total


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("state", ["softmax", "gmm", "fiak", "pruned", "compacted"])
@every_causal
def test_a_step_costs_what_the_tokens_cost_that_are_there(case: Case, state: str, left: bool) -> None:
    """Not what the longest input would: within 1.2 times of the cost at 128 tokens."""
    longest = 2048 if state == "fiak" else 8192  # whose priors themselves take 1 GiB a layer at 8192
    costs = {
        num_tokens: [bytes_of_a_step(decoding_model(case, state, num_tokens), cached, left) for cached in (20, 30)]
        for num_tokens in (128, 1024, longest)
    }
    print(f"bytes of a step with 20 and 30 cached tokens, {case.name}, {state}, by num_tokens: {costs}")
    for cost in (costs[1024], costs[longest]):
        assert all(step <= 1.2 * base for step, base in zip(cost, costs[128], strict=True)), costs


# ---------------------------------------------------------------------------------------------------------------------
# Other versions of transformers


def test_a_class_that_one_model_lacks_breaks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a release of transformers had renamed BERT's attention."""
    models = {name: CASES[name].model() for name in ("bert", "roberta", "vit", "gpt2", "llama")}
    for name, model in models.items():
        for module_class in {type(module) for module in model.modules()}:
            monkeypatch.delitem(conversion._ADAPTERS, module_class, raising=False)
        monkeypatch.delitem(sys.modules, f"fiak_ext.integrations.transformers.{name}", raising=False)
    monkeypatch.delattr(modeling_bert, "BertSelfAttention")
    for name in ("roberta", "vit", "gpt2", "llama"):
        case = CASES[name]
        expected = case.run(models[name], case.inputs())
        converted = convert(models[name], num_tokens=case.num_tokens)
        assert priors(converted)
        torch.testing.assert_close(case.run(converted, case.inputs()), expected)
    own = set(models["bert"].state_dict())
    with pytest.raises(ValueError, match=r"got .*BertSelfAttention, .*transformers\.bert cannot be imported \(cannot "):
        convert(models["bert"], num_tokens=8)
    both = torch.nn.ModuleList([models["bert"], CASES["gpt2"].model()])
    with pytest.raises(ValueError, match=r"cannot import name 'BertSelfAttention'"):
        convert(both, num_tokens=8)
    assert set(models["bert"].state_dict()) == own and not priors(both)
