"""``fiak_ext.ops``: the operators as functions, with examples that run, a default seed and patterns from masks."""

from __future__ import annotations

import doctest
import pydoc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fiak_ext
from fiak_ext import SparsePattern, ops

FUNCTIONS = [name for name in ops.__all__ if callable(getattr(ops, name)) and name.islower()]
ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "prior_attention": ops.prior_attention,
    "csr_attention": lambda query, key, value, **kwargs: ops.csr_attention(query, key, value, pattern(), **kwargs),
}
every_attention = pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)


def mask_of(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5


def pattern() -> SparsePattern:
    return SparsePattern.from_mask(mask_of(4, 6, 8))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """query of 4 heads, key and value of 2."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(2, heads, size, 5, generator=generator) for heads, size in ((4, 6), (2, 8), (2, 8))
    )
    return query, key, value


def test_the_package_exports_every_function() -> None:
    assert fiak_ext.ops is ops
    assert FUNCTIONS == ["compact_kv", "compact_linear", "csr_attention", "prior_attention"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_run(name: str) -> None:
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(ops, name), name)
    result = doctest.DocTestRunner().run(found)
    assert result.attempted > 3 and result.failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_answers(name: str) -> None:
    text = pydoc.plain(pydoc.render_doc(getattr(ops, name)))
    for part in ("Args:", "Returns:", "Raises:", "Example:", "``[B, "):
        assert part in text
    arguments = {argument.name for argument in getattr(torch.ops.fiak, name).default._schema.arguments}
    for argument in arguments - {"crow_indices", "col_indices", "plan", "summary"}:
        assert re.search(rf"\b{argument}\b", text.split("Args:")[1])


def test_the_readme_example_runs() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "fiak_ext.ops" in code)
    query, key, value = inputs()
    names: dict[str, Any] = {"fiak_ext": fiak_ext, "query": query, "key": key, "value": value, "mask": mask_of(4, 6, 8)}
    exec(example, names)
    assert names["output"].shape == query.shape


def test_functions_are_the_operators() -> None:
    query, key, value = inputs()
    lens, seed = torch.tensor([8, 5]), torch.tensor([3])
    kept = pattern()
    options: dict[str, Any] = {"kv_lens": lens, "dropout_p": 0.3, "seed": seed, "scale": 0.4, "score": "gaussian"}
    prior = torch.randn(2, 4, 6, 8)
    expected = torch.ops.fiak.prior_attention(query, key, value, prior, is_causal=True, log_prior=True, **options)
    assert torch.equal(
        ops.prior_attention(query, key, value, prior, is_causal=True, log_prior=True, **options), expected
    )
    entries, offsets = torch.randn(kept.nnz), torch.tensor([2, 0])
    csr = (kept.crow_indices, kept.col_indices, entries)
    options |= {"log_prior": True, "query_offsets": offsets}
    expected = torch.ops.fiak.csr_attention(query[:, :, :4], key, value, *csr, plan=kept.plan, **options)
    assert torch.equal(ops.csr_attention(query[:, :, :4], key, value, kept, entries, **options), expected)


@every_attention
def test_the_seed_comes_from_the_generator_of_torch(attention: Callable[..., Tensor]) -> None:
    torch.manual_seed(5)
    first, second = (attention(*inputs(), dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(attention(*inputs(), dropout_p=0.5), first)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,))
    assert torch.equal(attention(*inputs(), dropout_p=0.5, seed=seed), first)


@every_attention
def test_nothing_is_drawn_without_need(attention: Callable[..., Tensor]) -> None:
    state = torch.get_rng_state()
    attention(*inputs())
    attention(*inputs(), dropout_p=0.5, seed=torch.tensor([1]))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(4, 6, 8), (1, 6, 8), (2, 4, 6, 8), (1, 1, 6, 8)])
def test_masks(shape: tuple[int, ...]) -> None:
    mask = mask_of(*shape)
    output = ops.csr_attention(*inputs(), mask)
    assert torch.equal(output, ops.csr_attention(*inputs(), SparsePattern.from_mask(mask, 4)))
    prior = mask.float() if mask.dim() == 4 else mask.float().unsqueeze(0)
    torch.testing.assert_close(output, ops.prior_attention(*inputs(), prior))


def test_a_pattern_keeps_its_plan() -> None:
    kept = pattern()
    ops.csr_attention(*inputs(), kept)
    plan = kept.plan
    ops.csr_attention(*inputs(), kept)
    assert kept.plan is plan


def test_wrong_uses_are_named() -> None:
    query, key, value = inputs()
    with pytest.raises(TypeError, match=r"mask must be bool, True where kept \(got torch.float32\)"):
        ops.csr_attention(query, key, value, mask_of(4, 6, 8).float())
    with pytest.raises(ValueError, match=r"mask must have 1 or num_heads = 4 heads \(got 2\)"):
        ops.csr_attention(query, key, value, mask_of(2, 6, 8))
    for wrong in (query[0], query[:, :2]):
        with pytest.raises(ValueError, match=r"query must be \[batch, 4, queries, head_dim\]"):
            ops.csr_attention(wrong, key, value, pattern())
    with pytest.raises(ValueError, match=r"query must be \[batch, 4, queries, head_dim\]"):
        ops.csr_attention(query[0], key, value, mask_of(4, 6, 8))
    with pytest.raises(RuntimeError, match=r"dropout_p must lie in 0..1 \(got 1.5\)"):
        ops.prior_attention(query, key, value, dropout_p=1.5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@every_attention
def test_compiled_code_is_one_graph(attention: Callable[..., Tensor], dropout_p: float) -> None:
    torch.compiler.reset()
    kept = pattern()

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if attention is ops.prior_attention:
            return ops.prior_attention(query, key, value, is_causal=True, dropout_p=dropout_p)
        return ops.csr_attention(query, key, value, kept, dropout_p=dropout_p)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.manual_seed(5)
        leaves = [x.requires_grad_() for x in inputs()]
        expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        torch.manual_seed(5)
        torch.testing.assert_close(torch.autograd.grad(compiled(*leaves).square().sum(), leaves), expected)


def test_compiled_code_takes_patterns() -> None:
    torch.compiler.reset()
    compiled = torch.compile(ops.csr_attention, fullgraph=True, backend="aot_eager")
    for mask in (mask_of(4, 6, 8), ~mask_of(4, 6, 8)):
        kept = SparsePattern.from_mask(mask)
        torch.testing.assert_close(compiled(*inputs(), kept), ops.csr_attention(*inputs(), kept))
