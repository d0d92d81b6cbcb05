"""What a :class:`~fiak_ext.PriorAttention` holds: a prior or a pattern, through copies, moves and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fiak_ext.pattern import Plan, SparsePattern

__all__ = ["SAVED_STATE", "Kind", "PriorState"]

Kind = Literal["fiak", "gmm", "softmax"]

# What a checkpoint of a pruned module holds. These are plain attributes, not buffers: code that averages, truncates or
# offloads buffers as it averages weights would move indices.
_PATTERN_STATE = ("pattern_crow_indices", "pattern_col_indices", "keep")
SAVED_STATE = (*_PATTERN_STATE, "pattern_checksum")
_CALIBRATION = ("posterior", "reached", "saliency")


class PriorState(nn.Module):
    """Base of :class:`~fiak_ext.PriorAttention`: a prior, which is a parameter, or the pattern that took its place.

    A subclass defines :meth:`reset_parameters`, and calls :meth:`_restore_prior` at the end of its ``__init__``.

    Args:
        num_heads, num_queries, num_keys, groups, kind: of :class:`~fiak_ext.PriorAttention`.
    """

    prior: nn.Parameter | None
    pattern_crow_indices: Tensor | None
    pattern_col_indices: Tensor | None
    keep: Tensor | None
    _plan: Plan | None
    _place: Tensor
    posterior: Tensor | None
    reached: Tensor | None
    saliency: Tensor | None

    def __init__(self, num_heads: int, num_queries: int, num_keys: int, groups: int, kind: Kind) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_queries = num_queries
        self.num_keys = num_keys
        self.groups = groups
        self.kind = kind
        self.register_parameter("prior", None)
        self._place = torch.empty(0)  # tells where a module without prior lies
        self._forget()

    def reset_parameters(self) -> None:
        """Sets the prior, if there is one, to its initial value."""
        raise NotImplementedError(f"{type(self).__name__}.reset_parameters must be defined")

    # ---------------------------------------------------------------- the pattern

    @property
    def is_pruned(self) -> bool:
        """Whether a static pattern has taken the place of the prior."""
        return self.pattern_crow_indices is not None

    @property
    def is_compacted(self) -> bool:
        """Whether ``compact`` has dropped the keys that no query keeps."""
        return self.keep is not None

    @property
    def pattern(self) -> SparsePattern | None:
        """The pairs that are left, or None before pruning; once compacted, its columns are those of ``keep``."""
        if self.pattern_crow_indices is None or self.pattern_col_indices is None:
            return None
        pattern = SparsePattern(
            self.pattern_crow_indices,
            self.pattern_col_indices,
            self.num_heads,
            self.num_queries,
            self.num_keys if self.keep is None else self.keep.size(1),
            self.groups,
        )
        pattern._plan = self._plan
        return pattern

    @property
    def pattern_checksum(self) -> Tensor | None:
        """int64: what a checkpoint holds to tell whether its indices are still those that were saved; None if dense."""
        if self.pattern_crow_indices is None:
            return None
        return _checksum(self.pattern_crow_indices, self.pattern_col_indices, self.keep)

    # ---------------------------------------------------------------- pruning, and back

    def _forget(self) -> None:
        """Drops the pattern and the results of calibration."""
        for name in (*_PATTERN_STATE, *_CALIBRATION):
            setattr(self, name, None)
        self._plan = None

    # Tensors that a module keeps are made outside inference mode: autograd could not save those made inside.
    @torch.inference_mode(False)
    def _adopt(self, pattern: SparsePattern, keep: Tensor | None) -> None:
        """Takes copies of the pattern's indices; the plan, which nobody writes to, serves both."""
        self.prior = None
        self._forget()
        own = pattern.clone()
        self.pattern_crow_indices, self.pattern_col_indices = own.crow_indices, own.col_indices
        versions = own.crow_indices._version, own.col_indices._version
        self._plan = pattern._made_plan()._replace(versions=versions)
        self.keep = None if keep is None else keep.clone()

    @torch.inference_mode(False)
    def _restore_prior(self) -> None:
        """Takes the state before pruning, with an initial prior."""
        device = self._device
        self._forget()
        if self.kind != "softmax":
            self.prior = nn.Parameter(torch.empty(self._prior_shape, device=device, dtype=self._place.dtype))
            self.reset_parameters()

    @property
    def _prior_shape(self) -> tuple[int, int, int, int]:
        return self.groups, self.num_heads, self.num_queries if self.kind == "fiak" else 1, self.num_keys

    # ---------------------------------------------------------------- copies and moves

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}  # plans are made, never copied or saved

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PriorState:
        super()._apply(fn, recurse)
        self._place = fn(self._place)
        for name in (*_PATTERN_STATE, *_CALIBRATION):
            if (tensor := getattr(self, name)) is not None:
                with torch.inference_mode(False):
                    setattr(self, name, fn(tensor))
        self._follow(self._place.device)
        return self

    def _follow(self, device: torch.device) -> None:
        """Brings what is no parameter to ``device``: code that places models may move parameters and buffers only."""
        if self._plan is not None and self._plan.plan.device != device:
            self._plan = None
        for name in (*_PATTERN_STATE, *_CALIBRATION):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != device:
                with torch.inference_mode(False):
                    setattr(self, name, tensor.to(device))

    @property
    def _device(self) -> torch.device:
        tensor = self.pattern_crow_indices if self.prior is None else self.prior
        return (self._place if tensor is None else tensor).device

    # ---------------------------------------------------------------- checkpoints

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in SAVED_STATE:
            if (tensor := getattr(self, name)) is not None:
                destination[prefix + name] = tensor.clone()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes the checkpoint's state, dense, pruned or compacted, or leaves the module as it is."""
        crow, col, keep, checksum = (state_dict.get(prefix + name) for name in SAVED_STATE)
        prior = state_dict.get(f"{prefix}prior")
        if crow is not None and col is not None:
            try:
                self._load_pattern(crow, col, keep, checksum, local_metadata)
            except (TypeError, ValueError, RuntimeError) as error:
                error_msgs.append(f"{prefix}pattern: {error}")
                return
        elif self.is_pruned:
            # What torch saves says of every module that it was there; dense softmax attention saves nothing else.
            dense = "version" in local_metadata if self.kind == "softmax" else prior is not None
            if dense and (prior is None or tuple(prior.shape) == self._prior_shape):
                self._restore_prior()
            elif dense:
                got = None if prior is None else tuple(prior.shape)
                error_msgs.append(f"{prefix}prior: shape must be {self._prior_shape} (got {got} in the checkpoint)")
                return
            elif strict:
                missing_keys += [prefix + name for name in SAVED_STATE if getattr(self, name) is not None]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if crow is not None and col is not None:
            known = {prefix + name for name in SAVED_STATE}
            unexpected_keys[:] = [name for name in unexpected_keys if name not in known]

    def _load_pattern(
        self,
        crow: Tensor,
        col: Tensor,
        keep: Tensor | None,
        checksum: Tensor | None,
        metadata: Mapping[str, Any],
    ) -> None:
        if keep is not None:
            _check_keep(keep, self.num_heads, self.num_keys)
        num_keys = self.num_keys if keep is None else keep.size(1)
        pattern = SparsePattern.from_csr(crow, col, self.num_heads, self.num_queries, num_keys, self.groups)
        if checksum is not None and not checksum.is_meta:
            expected, got = int(_checksum(crow, col, keep)), checksum.tolist()
            if got != expected:
                raise ValueError(
                    f"pattern_checksum must be that of crow_indices, col_indices and keep, {expected} (got {got}): "
                    "average or cast parameters only, and leave what else is in a state_dict as it is"
                )
        if not metadata.get("assign_to_params_buffers", False):
            pattern = pattern.to(self._device)
            keep = None if keep is None else keep.to(self._device)
        self._adopt(pattern, keep)

    def _state(self) -> str:
        pattern = self.pattern
        if pattern is None:
            return "dense"
        return f"{'compacted' if self.is_compacted else 'pruned'} to {pattern.nnz} pairs"


def _check_keep(keep: Tensor, num_heads: int, num_keys: int) -> None:
    if keep.dtype != torch.int64 or keep.dim() != 2 or keep.size(0) < 1 or num_heads % keep.size(0):
        raise ValueError(
            f"keep must be int64 [key heads, kept keys] for {num_heads} query heads (got {keep.dtype}, "
            f"shape {tuple(keep.shape)})"
        )
    rises = (keep[:, 1:] > keep[:, :-1]) & (keep[:, :-1] >= 0) | (keep[:, 1:] == -1)
    if not bool(rises.all() and (keep >= -1).all() and (keep < num_keys).all()):
        raise ValueError(f"keep must ascend within 0..{num_keys - 1} in each row and end in -1 where it is shorter")


def _checksum(*indices: Tensor | None) -> Tensor:
    """An int64 of what the indices are and where: whoever averages a state_dict moves some of them by one.

    It is less than 2**24, so that float32 holds it: averages that move no index do not move it either.
    """
    modulus = 16_777_213  # a prime
    total = torch.zeros((), dtype=torch.int64)
    for tensor in indices:
        if tensor is not None:
            places = torch.arange(1, tensor.numel() + 1, device=tensor.device)
            total = 31 * total.to(tensor.device) + (places * 7_919 % modulus * tensor.flatten().long()).sum()
    return total % modulus
