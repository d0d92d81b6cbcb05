"""Priors in the attention of any model: ``convert``, and what the adapters in ``fiak_ext.integrations`` build on.

An attention module is converted in place: its class becomes a subclass of what it was, which calls the
:class:`~fiak_ext.PriorAttention` that it gets as its submodule ``prior_attention``. Parameters, their names, hooks and
what ``isinstance`` says stay.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fiak_ext.nn import Kind, Parameterization, PriorAttention, PriorAttentionHost
from fiak_ext.ops import Score

__all__ = [
    "ConvertedAttention",
    "Padding",
    "PatchGrid",
    "convert",
    "convert_with",
    "expect",
    "from_pretrained",
    "register_attention",
    "resize_priors",
    "roll",
]

Model = TypeVar("Model", bound=nn.Module)
Adapter = TypeVar("Adapter", bound="type[ConvertedAttention]")

# Where classes of a model come from: the module of fiak_ext.integrations that knows attention of theirs.
_INTEGRATIONS = {
    "torch": "torch_nn",
    "timm": "timm",
    "transformers.models.bert": "transformers.bert",
    "transformers.models.gpt2": "transformers.gpt2",
    "transformers.models.llama": "transformers.llama",
    "transformers.models.roberta": "transformers.roberta",
    "transformers.models.vit": "transformers.vit",
}
_ATTENTION_NAME = re.compile(r"Attention|Attn")


class ConvertedAttention(PriorAttentionHost):
    """Base of the classes that attention modules of other libraries get by :func:`convert`.

    A subclass derives from this class and from the attention class it stands for, in this order, is registered with
    :func:`register_attention`, and defines :meth:`prior_arguments` and ``forward``. Its ``__init__`` never runs.
    """

    @classmethod
    def prior_arguments(cls, module: nn.Module, parents: Sequence[nn.Module]) -> dict[str, Any]:
        """What :class:`~fiak_ext.PriorAttention` is to be made with for ``module``.

        Args:
            module: of the attention class; not converted yet, and not to be changed.
            parents: the modules that hold it, the model first.

        Returns:
            ``num_heads``, and what else is known: ``num_queries`` where the model fixes it, ``is_causal`` where the
            module itself is causal or is not, ``scale``, ``dropout_p``, ``groups``.

        Raises:
            ValueError: a module with settings that are not supported; the message says which, without its name.
        """
        raise NotImplementedError(f"{cls.__name__}.prior_arguments must be defined")

    @classmethod
    def finish(cls, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Called once, after all attention of ``model`` is converted, with the arguments of :func:`convert`."""


class PatchGrid(nn.Module):
    """Base of the classes that image models, or their patch embeddings, get by :func:`convert`.

    Attributes:
        prior_grid: rows and columns of the patches that priors or patterns of attention belong to;
            :func:`resize_priors` sets it.
    """

    prior_grid: tuple[int, int]

    def expect_grid(self, got: tuple[int, int]) -> None:
        """Refuses images whose patches would meet the rows and columns of others.

        Raises:
            ValueError: another grid, also one of as many patches.
        """
        if got != self.prior_grid:
            rows, columns = self.prior_grid
            raise ValueError(
                f"{type(self).__name__}: images must have {rows} x {columns} patches, as the priors have "
                f"(got {got[0]} x {got[1]}); before pruning, resize_priors fits priors to another size"
            )


class GridModel(PatchGrid):
    """Base of the classes that whole image models get."""

    @property
    def has_places(self) -> bool:
        """Whether attention tells positions apart, or measures them: all but softmax attention before pruning."""
        attentions = [module for module in self.modules() if isinstance(module, PriorAttention)]
        return any(a.is_pruned or a.prior is not None or a.recorder is not None for a in attentions)


_ADAPTERS: dict[type[nn.Module], type[ConvertedAttention]] = {}


def register_attention(attention_class: type[nn.Module]) -> Callable[[Adapter], Adapter]:
    """Class decorator: :func:`convert` makes modules of ``attention_class`` instances of the decorated class.

    Modules of other subclasses of ``attention_class`` are not converted: they may compute something else.

    Raises:
        TypeError: a decorated class that is not a subclass of ``ConvertedAttention`` and of ``attention_class``.
    """

    def register(adapter: Adapter) -> Adapter:
        for base in (ConvertedAttention, attention_class):
            if not issubclass(adapter, base):
                raise TypeError(
                    f"register_attention: class must be a subclass of {base.__name__} (got {adapter.__name__})"
                )
        _ADAPTERS[attention_class] = adapter
        return adapter

    return register


def convert(
    model: Model,
    *,
    num_tokens: int | None = None,
    kind: Kind = "fiak",
    parameterization: Parameterization = "logits",
    score: Score = "dot",
    is_causal: bool | None = None,
) -> Model:
    """Puts priors into the attention of a model of timm, Hugging Face transformers, torch.nn or another library.

    With the uniform priors that it starts with and the dot score, the model gives the outputs of the original to
    rounding. Names in ``state_dict`` stay; those of ``prior_attention`` modules come in addition. A model of this
    package, or an attention that is converted already, is left as it is.

    Args:
        model: changed in place.
        num_tokens: the longest input, in tokens, that attention can take; needed unless the model fixes it (image
            models).
        kind, parameterization, score: of :class:`~fiak_ext.PriorAttention`; ``"softmax"`` as kind has no priors, for
            ``calibrate`` and ``prune(..., importance="posterior")``.
        is_causal: for ``torch.nn``, whose modules do not say it themselves: they are causal if True.

    Returns:
        The model itself.

    Raises:
        ValueError: attention that is not supported, named with its place and class; a model without attention;
            ``num_tokens`` that is no integer of at least 1; ``num_tokens`` or ``is_causal`` where the model says
            otherwise, or no ``num_tokens`` where it must be given. The model is then left as it was.
    """
    return convert_with(
        PriorAttention,
        model,
        num_tokens=num_tokens,
        kind=kind,
        parameterization=parameterization,
        score=score,
        is_causal=is_causal,
    )


@torch.inference_mode(False)  # what is made here is trained later
def convert_with(
    make: Callable[..., PriorAttention],
    model: Model,
    *,
    num_tokens: int | None,
    is_causal: bool | None,
    **chosen: Any,
) -> Model:
    """:func:`convert` with the attention that ``make`` gives for the arguments of :class:`~fiak_ext.PriorAttention`."""
    if num_tokens is not None and not _is_size(num_tokens):
        raise ValueError(f"convert: num_tokens must be an integer of at least 1 (got {num_tokens!r})")
    num_tokens = None if num_tokens is None else int(num_tokens)  # numpy's integers are not for config.json
    search = _Search(_import_integrations(model))
    search.visit(model, "", ())
    if not any(search.covered.values()):
        raise ValueError(f"convert: model must hold attention modules (got {type(model).__name__})")
    known: dict[str, dict[str, Any]] = {}
    for name, found in search.supported.items():
        try:
            known[name] = found.adapter.prior_arguments(found.module, found.parents)
        except ValueError as error:
            search.refused[name] = f"{type(found.module).__name__}, {error}"
    if search.refused:
        places = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in search.refused.items())
        raise ValueError(f"convert: attention must be of a supported kind (got {places})")
    priors = {}
    for name, arguments in known.items():
        module = search.supported[name].module
        _settle(arguments, "num_queries", "num_tokens", num_tokens, f"{name or 'the model'}, {type(module).__name__}")
        _settle(arguments, "is_causal", "is_causal", is_causal, f"{name or 'the model'}, {type(module).__name__}")
        priors[name] = _like(make(**arguments, **chosen), module)
    # Everything that can be wrong has been refused by now: an error leaves the model as it was.
    for name, prior_attention in priors.items():
        module, adapter = search.supported[name].module, search.supported[name].adapter
        module.__class__ = adapter
        module.prior_attention = prior_attention
    for adapter in dict.fromkeys(found.adapter for found in search.supported.values()):
        adapter.finish(model, {"num_tokens": num_tokens, "is_causal": is_causal, **chosen})
    return model


@torch.inference_mode(False)  # what is made here is trained later
def from_pretrained(folder: str | Path, variant: str | None = None) -> Any:
    """Loads a converted Hugging Face model, dense, pruned or compacted, from where its ``save_pretrained`` saved it.

    ``save_pretrained`` writes how the model was converted to ``config.json``, as ``fiak``, and priors and patterns to
    the safetensors files of the weights, which are all that is read: nothing is unpickled. transformers' own
    ``from_pretrained`` refuses such a folder. For other models, convert a new one in the same way and load the
    ``state_dict``.

    Args:
        folder: on this machine.
        variant: of the files, as ``save_pretrained(folder, variant=...)`` wrote them.

    Raises:
        ValueError: a folder without such a model, or a configuration, names or sizes that do not belong together;
            sizes are compared before anything of these sizes is made.
        RuntimeError: patterns that are not well-formed.
        ModuleNotFoundError: transformers is not installed.
    """
    integration = importlib.import_module("fiak_ext.integrations.transformers.saving")
    return integration.from_pretrained(folder, variant)


@torch.inference_mode(False)  # what is made here is trained later
def resize_priors(
    model: Model, grid: tuple[int, int], new_grid: tuple[int, int], *, num_prefix_tokens: int = 1
) -> Model:
    """Fits the priors of an image model to another size of images, as position embeddings are, by bicubic resizing.

    Queries and keys are positions of the grid of patches, row by row, behind the tokens that are none (class token).
    Logits or pi are interpolated along both; results of calibration are dropped. Resize what else depends on the size
    with the model's own library. timm's ``set_input_size`` of a converted vision transformer calls this function; after
    it there is nothing left to do.

    Args:
        model: all its ``PriorAttention`` modules have as many queries and keys as ``grid`` and prefix say; none is
            pruned. Changed in place; an optimizer made before holds the old priors.
        grid: rows and columns of patches now.
        new_grid: rows and columns of patches to be.
        num_prefix_tokens: tokens before the patches.

    Returns:
        The model itself.

    Raises:
        ValueError: no ``PriorAttention``, a pruned one, one of another size, or a new grid without patches; the model
            is then left as it was.
    """
    attentions = {name: module for name, module in model.named_modules() if isinstance(module, PriorAttention)}
    if not attentions:
        raise ValueError(f"resize_priors: model must hold PriorAttention modules (got {type(model).__name__})")
    if min(new_grid) < 1:
        raise ValueError(f"resize_priors: new_grid must have at least one row and one column (got {new_grid})")
    models = [module for module in model.modules() if isinstance(module, PatchGrid)]
    if models and all(module.prior_grid == tuple(new_grid) for module in models):
        return model
    for module in models:
        if module.prior_grid != tuple(grid):
            raise ValueError(f"resize_priors: grid must be that of all attention, {module.prior_grid} (got {grid})")
    tokens = num_prefix_tokens + grid[0] * grid[1]
    for name, attention in attentions.items():
        if attention.is_pruned:
            raise ValueError(f"resize_priors: model must not be pruned (got {name!r} pruned)")
        if (attention.num_queries, attention.num_keys) != (tokens, tokens):
            raise ValueError(
                f"resize_priors: grid must be that of all attention (got {grid} and {num_prefix_tokens} tokens before "
                f"it for {attention.num_queries} queries and {attention.num_keys} keys of {name!r})"
            )
    for attention in attentions.values():
        prior = attention.prior
        attention.num_queries = attention.num_keys = num_prefix_tokens + new_grid[0] * new_grid[1]
        attention._forget()
        if prior is not None:
            resized = _resize(prior.detach(), grid, new_grid, num_prefix_tokens)
            if prior.size(2) > 1:
                resized = _resize(resized.mT, grid, new_grid, num_prefix_tokens).mT
            attention.prior = nn.Parameter(resized.contiguous(), requires_grad=prior.requires_grad)
    for module in models:
        module.prior_grid = (new_grid[0], new_grid[1])
    return model


def _resize(prior: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """The last dimension of ``prior [groups, heads, rows, tokens]`` on another grid."""
    prefix, patches = prior[..., :num_prefix_tokens], prior[..., num_prefix_tokens:]
    patches = F.interpolate(patches.flatten(0, 1).unflatten(2, grid), new_grid, mode="bicubic", antialias=True)
    return torch.cat([prefix, patches.flatten(2).unflatten(0, prior.shape[:2])], -1)


@dataclass(frozen=True)
class _Found:
    module: nn.Module
    adapter: type[ConvertedAttention]
    parents: tuple[nn.Module, ...]


class _Search:
    """The attention modules of a model: by name those with an adapter, and those without and why they are refused."""

    def __init__(self, failed: Mapping[str, ImportError]) -> None:
        self.failed = failed  # as _import_integrations returns it
        self.supported: dict[str, _Found] = {}
        self.refused: dict[str, str] = {}
        self.covered: dict[nn.Module, bool] = {}  # every module that is or holds attention; False where it does not

    def visit(self, module: nn.Module, name: str, parents: tuple[nn.Module, ...]) -> bool:
        """Whether the module is or holds attention."""
        if module not in self.covered:
            self.covered[module] = self._visit(module, name, parents)
        return self.covered[module]

    def _visit(self, module: nn.Module, name: str, parents: tuple[nn.Module, ...]) -> bool:
        if isinstance(module, (PriorAttention, PriorAttentionHost)):
            return True
        if (adapter := _ADAPTERS.get(type(module))) is not None:
            self.supported[name] = _Found(module, adapter, parents)
            return True
        prefix = f"{name}." if name else ""
        children = [self.visit(child, prefix + key, (*parents, module)) for key, child in module.named_children()]
        if any(children):
            return True
        if _ATTENTION_NAME.search(type(module).__name__) or isinstance(module, tuple(_ADAPTERS)):
            place = f"{type(module).__module__}.{type(module).__name__}"
            reason = "for which nothing is registered with register_attention"
            for package, error in self.failed.items():
                if any(_is_from(package, base) for base in type(module).__mro__):
                    reason += f", as fiak_ext.integrations.{_INTEGRATIONS[package]} cannot be imported ({error})"
            self.refused[name] = f"{place}, {reason}"
            return True
        return False


def _import_integrations(model: nn.Module) -> dict[str, ImportError]:
    """Imports what knows the attention of the model's classes; errors by their package, where a class is missing."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    failed: dict[str, ImportError] = {}
    for package, integration in _INTEGRATIONS.items():
        if any(_is_from(package, base) for base in classes):
            try:
                importlib.import_module(f"fiak_ext.integrations.{integration}")
            except ImportError as error:
                failed[package] = error
    return failed


def _is_from(package: str, base: type) -> bool:
    return f"{base.__module__}.".startswith(f"{package}.")


def _is_size(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= 1


def _settle(arguments: dict[str, Any], key: str, name: str, given: Any, place: str) -> None:
    """What the caller gives goes where the model does not say it, and must agree with it where it does."""
    known = arguments.get(key)
    if known is None and given is None and key == "num_queries":
        raise ValueError(f"convert: {name} must be given (got None; needed by {place})")
    if known is not None and given is not None and known != given:
        raise ValueError(f"convert: {name} must be {known}, as in the model, or be left out (got {given} for {place})")
    arguments[key] = given if known is None else known
    if arguments[key] is None:
        del arguments[key]


def _like(prior_attention: PriorAttention, module: nn.Module) -> PriorAttention:
    """On the module's device, in float32 or, with float64 parameters, float64, and in its mode."""
    parameter = next(module.parameters(), torch.empty(0))
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return prior_attention.to(parameter.device, dtype).train(module.training)


# ---------------------------------------------------------------------------------------------------------------------
# What adapters share


def expect(condition: Tensor, message: str) -> None:
    """Raises ValueError(message) unless the boolean tensor of one element is True; compiled code asserts it.

    Raises:
        ValueError: as said; RuntimeError in compiled code.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)


class Padding:
    """Where the tokens of each batch element are, from a mask of those that are visible, padding on either side.

    Priors belong to positions, so tokens must start at position 0: :meth:`roll` moves left padding to the right end.

    Args:
        visible: bool ``[B, M]``, True for tokens that may be attended.
        name: of the mask, for errors.

    Attributes:
        kv_lens: ``[B]``, the number of tokens.
        first: ``[B]``, the place of the first one, or None where it is 0 everywhere (compiled code does not look).

    Raises:
        ValueError: hidden tokens between visible ones.
    """

    def __init__(self, visible: Tensor, name: str) -> None:
        kept = visible.int()
        self.kv_lens = kept.sum(-1)
        self.first: Tensor | None = kept.argmax(-1)
        behind = visible.size(-1) - kept.flip(-1).argmax(-1)
        gaps = (behind - self.first != self.kv_lens) & (self.kv_lens > 0)
        expect(~gaps.any(), f"{name} must hide tokens at the ends only (got a hidden token between visible ones)")
        if not torch.compiler.is_compiling() and not bool(self.first.any()):
            self.first = None

    def roll(self, x: Tensor, dim: int) -> Tensor:
        """``x [B, ...]`` with each element's tokens, along ``dim``, from position 0 on and its padding behind them."""
        return x if self.first is None else roll(x, self.first, dim)

    def unroll(self, x: Tensor, dim: int) -> Tensor:
        """The inverse of :meth:`roll`."""
        return x if self.first is None else roll(x, -self.first, dim)


def roll(x: Tensor, shifts: Tensor, dim: int) -> Tensor:
    """``x [B, ...]`` with element b moved towards the start of ``dim`` by ``shifts[b]``, and around its end."""
    size = x.size(dim)
    places = (torch.arange(size, device=x.device) + shifts.unsqueeze(-1)) % size
    shape = [1] * x.dim()
    shape[0], shape[dim] = places.shape
    return torch.take_along_dim(x, places.view(shape), dim)
