"""torch.compile, torch.export and torch.func on the ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CSR_CASES, PRIOR_CASES, Case, csr_of
from torch import Tensor, nn

from fiak_ext import CausalLM, MultiHeadSelfAttention, compact, convert, prune

ops = torch.ops.fiak


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _check(function: Callable[..., Tensor], make: Callable[[int], list[Tensor | None]], backend: str) -> None:
    """Compiled without breaks, and for dynamic shapes: the third size must not compile again."""
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for size in (6, 9, 13):
        arguments = make(size)
        results = []
        for call in (function, compiled):
            leaves = [x.clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in arguments]
            wanted = [x for x in leaves if x is not None and x.requires_grad]
            with torch.compiler.set_stance("fail_on_recompile" if size == 13 else "default"):
                output = call(*leaves)
            results.append([output, *torch.autograd.grad(output.sin().sum(), wanted)])
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y)


def _prior(query: Tensor, key: Tensor, value: Tensor, prior: Tensor | None, kv_lens: Tensor, seed: Tensor) -> Tensor:
    options = {"is_causal": True, "dropout_p": 0.2, "seed": seed, "kv_lens": kv_lens}
    return 2 * ops.prior_attention(query * 1.5, key, value, prior, score="gaussian", **options)


def _qkv(size: int) -> list[Tensor]:
    return [torch.randn(2, heads, size, 8) for heads in (4, 2, 2)]


def _csr(query: Tensor, key: Tensor, value: Tensor, crow: Tensor, col: Tensor, values: Tensor | None) -> Tensor:
    plan = ops.csr_plan(crow, col, query.shape[2], key.shape[2])
    return 2 * ops.csr_attention(query * 1.5, key, value, crow, col, values, plan=plan)


def _pattern(size: int) -> list[Tensor]:
    crow, col = csr_of(torch.rand(4 * size, size) < 0.5)
    return [crow, col]


def _compact(key: Tensor, value: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    kept_key, kept_value = ops.compact_kv(key, value, keep)
    return torch.cat([kept_key, kept_value, ops.compact_linear(tokens, weight, bias, keep)], -1)


def _prior_arguments(size: int) -> list[Tensor | None]:
    return [*_qkv(size), torch.rand(1, 4, size, size), torch.tensor([size, size // 2]), torch.tensor([3])]


def _csr_arguments(size: int) -> list[Tensor | None]:
    pattern = _pattern(size)
    return [*_qkv(size), *pattern, torch.rand(pattern[1].numel())]


def _compact_arguments(size: int) -> list[Tensor | None]:
    keep = torch.stack([torch.randperm(size)[: size // 2].sort().values for _ in range(2)])
    return [*_qkv(size)[1:], torch.randn(2, size, 5), torch.randn(2 * 8, 5), torch.randn(2 * 8), keep]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    ("function", "make"),
    [(_prior, _prior_arguments), (_csr, _csr_arguments), (_compact, _compact_arguments)],
    ids=["prior_attention", "csr_attention", "compact"],
)
def test_forward_and_backward_with_dynamic_shapes(
    function: Callable[..., Tensor], make: Callable[[int], list[Tensor | None]], backend: str
) -> None:
    torch.manual_seed(0)
    _check(function, make, backend)


def test_without_weights_and_without_a_plan() -> None:
    torch.manual_seed(0)
    _check(lambda q, k, v: ops.prior_attention(q, k, v), lambda n: list(_qkv(n)), "aot_eager")
    _check(
        lambda q, k, v, crow, col: ops.csr_attention(q, k, v, crow, col),
        lambda n: [*_qkv(n), *_pattern(n)],
        "aot_eager",
    )


def test_no_grad_and_autocast() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*arguments: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ops.prior_attention(*arguments)

    query, key, value = _qkv(6)
    with torch.no_grad():
        output = compiled(query, key, value)
    assert torch.equal(output, ops.prior_attention(query.bfloat16(), key.bfloat16(), value.bfloat16()))


@pytest.mark.parametrize("case", [PRIOR_CASES[0], CSR_CASES[3]], ids=lambda case: case.op)
def test_export(case: Case) -> None:
    problem = case.problem(torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return problem.public(*tensors)

    tensors = tuple(x for x in problem.tensors if x is not None)
    program = torch.export.export(Module(), tensors)
    assert torch.equal(program.module()(*tensors), problem.public(*tensors))


def test_malformed_arguments_are_named_while_compiling() -> None:
    compiled = torch.compile(ops.prior_attention, fullgraph=True, backend="aot_eager")
    query, key, value = _qkv(6)
    with pytest.raises(Exception, match=r"prior_attention: prior must have size 6 in dimension 3, key's rows"):
        compiled(query, key, value, torch.rand(1, 4, 6, 5))


def test_function_transforms_are_refused() -> None:
    query, key, value = _qkv(6)

    def loss(query: Tensor) -> Any:
        return ops.prior_attention(query, key, value).sum()

    with pytest.raises(RuntimeError, match=r"cannot use C\+\+ torch::autograd::Function with functorch transforms"):
        torch.func.grad(loss)(query)


# ---------------------------------------------------------------- modules with inputs of every length


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return convert(nn.TransformerEncoder(layer, 1), num_tokens=8, is_causal=False)


def _bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=11, max_position_embeddings=20, **sizes)
    return convert(transformers.BertModel(config, add_pooling_layer=False), num_tokens=8)


LENGTHS: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # and whether they take token numbers
    "attention": (lambda: MultiHeadSelfAttention(16, 2, 8), False),
    "causal attention": (lambda: MultiHeadSelfAttention(16, 2, 8, is_causal=True), False),
    "gmm": (lambda: MultiHeadSelfAttention(16, 2, 8, kind="gmm"), False),
    "softmax": (lambda: MultiHeadSelfAttention(16, 2, 8, kind="softmax"), False),
    "language model": (lambda: CausalLM(11, 8, 16, 1, 2, 32), True),
    "torch.nn.TransformerEncoder": (_encoder, False),
    "BERT": (_bert, True),
}


def _model(name: str, state: str) -> tuple[nn.Module, Callable[[int], Tensor]]:
    torch.manual_seed(0)
    make, takes_numbers = LENGTHS[name]
    model = make().eval()
    if state != "dense":
        prune(model, None if name == "gmm" else 0.5, keys=0.25, importance="random")
    if state == "compacted":
        compact(model)

    def inputs(tokens: int) -> Tensor:
        return torch.randint(11, (2, tokens)) if takes_numbers else torch.randn(2, tokens, 16)

    return model, inputs


def _output(result: Any) -> Tensor:
    output: Tensor = result if isinstance(result, Tensor) else result.last_hidden_state
    return output


@pytest.mark.parametrize("state", ["dense", "pruned", "compacted"])
@pytest.mark.parametrize("name", LENGTHS)
@torch.no_grad()
def test_export_with_the_longest_example_serves_every_length(name: str, state: str) -> None:
    model, inputs = _model(name, state)
    for example in (8, 5):
        dynamic = ({1: torch.export.Dim("tokens", min=2, max=8)},)
        try:
            program = torch.export.export(model, (inputs(example),), dynamic_shapes=dynamic).module()
        except torch._dynamo.exc.UserError as error:  # torch 2.11 does not know that min(8 n, 16 n) is 8 n
            assert state == "compacted" and torch.__version__.startswith("2.11.")
            assert "Constraints violated (tokens)" in str(error)
            continue
        for tokens in (3, 8, 5):
            x = inputs(tokens)
            torch.testing.assert_close(_output(program(x)), _output(model(x)))


@pytest.mark.parametrize("state", ["dense", "pruned", "compacted"])
@pytest.mark.parametrize("name", LENGTHS)
@torch.no_grad()
def test_the_longest_input_does_not_compile_again(name: str, state: str) -> None:
    model, inputs = _model(name, state)
    for first, *others in ((5, 8, 3), (8, 3, 5)):
        torch._dynamo.reset()
        compiled = torch.compile(model, dynamic=True, backend="eager")
        compiled(inputs(first))
        with torch.compiler.set_stance("fail_on_recompile"):
            for tokens in others:
                x = inputs(tokens)
                torch.testing.assert_close(_output(compiled(x)), _output(model(x)))
