"""Attention with learned priors over its (query, key) pairs, and the same attention once it is pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fiak_ext.pattern import SparsePattern, check_size
from fiak_ext.projection import project_qkv

__all__ = ["MultiHeadSelfAttention", "PriorAttention"]

Kind = Literal["fiak", "gmm", "softmax"]
Parameterization = Literal["logits", "clamp"]
Score = Literal["dot", "gaussian"]

# What a checkpoint of a pruned module holds. These are plain attributes, not buffers: code that averages, truncates or
# offloads buffers as it averages weights would move indices.
_PATTERN_STATE = ("pattern_crow_indices", "pattern_col_indices", "keep")
SAVED_STATE = (*_PATTERN_STATE, "pattern_checksum")
_CALIBRATION = ("posterior", "reached", "saliency")


class PriorAttention(nn.Module):
    """Multi-head attention whose pairs carry a learned prior, without projections (Eq. 12 of the paper).

    ``a_ij = w_ij exp(s_ij) / sum_j' w_ij' exp(s_ij')``, with weights ``w`` shared by the whole batch. Once pruned
    (:meth:`set_pattern`), the prior is gone, the pairs of the pattern have weight 1 and all others do not exist. A
    checkpoint says by itself whether it is pruned: loading it turns the module into what it needs, and one that does
    not fit leaves the module as it was. The pattern is in ``state_dict``, as copies, but it is no buffer: it takes part
    in no average. No two modules share its tensors.

    Args:
        num_heads: query heads.
        num_queries: the longest input, in queries; shorter ones use the first rows.
        num_keys: the longest input, in keys; by default ``num_queries``.
        kind: ``"fiak"``, a prior for every pair (Eq. 12); ``"gmm"``, one for every key (Eq. 7); ``"softmax"``, none,
            the dense baseline.
        parameterization: ``"logits"``, priors are the softmax of logits over the keys that a query may see, and start
            uniform; ``"clamp"``, the paper's ``min(|pi|, 1)``, starting at ``num_keys ** -0.5`` for FiAK, at
            ``1 / num_keys`` for GMM and at 1 for causal attention.
        is_causal: query i sees keys ``j <= i``.
        score: ``"dot"``, ``s = scale q.k``, or ``"gaussian"``, ``s = -scale/2 |q-k|^2`` (Eq. 8).
        scale: by default ``1 / sqrt(D)``.
        dropout_p: probability of dropping a normalised weight in training.
        groups: priors that the batch elements use in turn: element b uses group ``b % groups``.

    Attributes:
        prior: the parameter, logits (``"logits"``) or pi (``"clamp"``): ``[groups, num_heads, num_queries, num_keys]``
            for FiAK, ``[groups, num_heads, 1, num_keys]`` for GMM; None for softmax attention and once pruned.
        posterior: mean posterior attention ``[groups, num_heads, num_queries, num_keys]``, or None before calibration;
            not saved. ``reached``, of the same shape, counts the inputs behind each mean.
        saliency: the same for the other importance that ``calibrate`` measures.
        recorder: called with query, key and the other arguments of :meth:`forward` as a dict before each forward, if
            not None.

    Raises:
        ValueError: a size that is not an integer of at least 1, a probability outside 0..1, or an unknown name.
    """

    prior: nn.Parameter | None
    pattern_crow_indices: Tensor | None
    pattern_col_indices: Tensor | None
    keep: Tensor | None
    _plan: Tensor | None
    _plan_versions: tuple[int, int] | None
    _place: Tensor
    posterior: Tensor | None
    reached: Tensor | None
    saliency: Tensor | None

    def __init__(
        self,
        num_heads: int,
        num_queries: int,
        num_keys: int | None = None,
        *,
        kind: Kind = "fiak",
        parameterization: Parameterization = "logits",
        is_causal: bool = False,
        score: Score = "dot",
        scale: float | None = None,
        dropout_p: float = 0.0,
        groups: int = 1,
    ) -> None:
        super().__init__()
        num_keys = num_queries if num_keys is None else num_keys
        sizes = {"num_heads": num_heads, "num_queries": num_queries, "num_keys": num_keys, "groups": groups}
        for name, size in sizes.items():
            check_size("PriorAttention", name, size, 1)
        for name, choice, choices in (
            ("kind", kind, ("fiak", "gmm", "softmax")),
            ("parameterization", parameterization, ("logits", "clamp")),
            ("score", score, ("dot", "gaussian")),
        ):
            if choice not in choices:
                raise ValueError(f"PriorAttention: {name} must be one of {', '.join(choices)} (got {choice!r})")
        if not 0.0 <= dropout_p <= 1.0:
            raise ValueError(f"PriorAttention: dropout_p must be in 0..1 (got {dropout_p})")
        self.num_heads = num_heads
        self.num_queries = num_queries
        self.num_keys = num_keys
        self.groups = groups
        self.kind = kind
        self.parameterization = parameterization
        self.is_causal = is_causal
        self.score = score
        self.scale = scale
        self.dropout_p = dropout_p
        self.recorder: Callable[[Tensor, Tensor, Mapping[str, Any]], None] | None = None
        self.register_parameter("prior", None)
        self._place = torch.empty(0)  # tells where a module without prior lies
        self._forget()
        self._restore_prior()

    def reset_parameters(self) -> None:
        """Sets the prior to its initial value, a uniform one."""
        if self.prior is None:
            return
        if self.parameterization == "logits":
            initial = 0.0
        elif self.is_causal:
            initial = 1.0
        else:
            initial = self.num_keys**-0.5 if self.kind == "fiak" else 1.0 / self.num_keys
        nn.init.constant_(self.prior, initial)

    # ---------------------------------------------------------------- the prior

    def eligible(self) -> Tensor:
        """bool ``[num_queries, num_keys]``: the pairs that may attend at all, ``j <= i`` if causal."""
        pairs = torch.ones(self.num_queries, self.num_keys, dtype=torch.bool, device=self._device)
        return pairs.tril() if self.is_causal else pairs

    def weight(self) -> Tensor:
        """The weights w that attention uses, in the shape of the prior, float32 (float64 for a float64 prior).

        ``"clamp"``: ``min(|pi|, 1)``. ``"logits"``: pi times the number of keys that the row may see (GMM: of all
        keys), so that a uniform prior gives ones. 0 for pairs of FiAK that are not eligible.

        Raises:
            RuntimeError: a module without prior: softmax attention, or pruned.
        """
        if self.prior is None:
            raise RuntimeError(f"PriorAttention.weight: there is no prior ({self._state()})")
        prior = self.prior if self.prior.dtype == torch.float64 else self.prior.float()
        causal = self.is_causal and self.kind == "fiak"
        if self.parameterization == "clamp":
            weight = _at_most_one(prior.abs())
            return weight.tril() if causal else weight
        if causal:
            prior = prior.masked_fill(~self.eligible(), -torch.inf)
            visible = torch.arange(1, self.num_queries + 1, device=prior.device).clamp(max=self.num_keys)
        else:
            visible = torch.full((1,), self.num_keys, device=prior.device)
        # Not softmax times count: its rounding would make a uniform prior differ from one at some counts.
        exponential = (prior - prior.detach().amax(-1, keepdim=True)).exp()
        return exponential * (visible.unsqueeze(-1) / exponential.sum(-1, keepdim=True))

    @torch.no_grad()
    def importance(self) -> Tensor:
        """What pruning ranks by, ``[groups, num_heads, num_queries, num_keys]``: 0 for pairs that are not eligible.

        ``"logits"``: pi times the number of keys that the row may see, comparable between rows because each row's mean
        is 1; ``"clamp"``: ``|pi|`` as it is. Softmax attention holds all eligible pairs for equally important.

        Raises:
            RuntimeError: a pruned module.
        """
        if self.is_pruned:
            raise RuntimeError("PriorAttention.importance: there is no prior any more (the module is pruned)")
        shape = (self.groups, self.num_heads, self.num_queries, self.num_keys)
        eligible = self.eligible()
        if self.prior is None:
            return eligible.float().expand(shape).clone()
        importance = self.prior.abs() if self.parameterization == "clamp" else self.weight()
        return importance.expand(shape).masked_fill(~eligible, 0)

    # ---------------------------------------------------------------- the pattern

    @property
    def is_pruned(self) -> bool:
        """Whether a static pattern has taken the place of the prior."""
        return self.pattern_crow_indices is not None

    @property
    def is_compacted(self) -> bool:
        """Whether :meth:`compact` has dropped the keys that no query keeps."""
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
        pattern._plan, pattern._plan_versions = self._plan, self._plan_versions
        return pattern

    @property
    def pattern_checksum(self) -> Tensor | None:
        """int64: what a checkpoint holds to tell whether its indices are still those that were saved; None if dense."""
        if self.pattern_crow_indices is None:
            return None
        return _checksum(self.pattern_crow_indices, self.pattern_col_indices, self.keep)

    def set_pattern(self, pattern: SparsePattern) -> None:
        """Prunes: deletes the prior and keeps the pairs of ``pattern``, with weight 1.

        Calibration results go with the prior. An optimizer made before still holds the deleted parameter: make a new
        one.

        Args:
            pattern: of this module's sizes; it is copied, to the module's device.

        Raises:
            ValueError: another number of heads, queries, keys or groups, or pairs above the diagonal where causal.
            RuntimeError: indices that are not a well-formed pattern, or a compacted module.
        """
        self._adopt(self._fitting(pattern), None)

    def _fitting(self, pattern: SparsePattern) -> SparsePattern:
        """The pattern on the module's device, checked as :meth:`set_pattern` says."""
        if self.is_compacted:
            raise RuntimeError("PriorAttention.set_pattern: the module must not be compacted")
        for name in ("num_heads", "num_queries", "num_keys", "groups"):
            expected, got = getattr(self, name), getattr(pattern, name)
            if got != expected:
                raise ValueError(f"PriorAttention.set_pattern: pattern.{name} must be {expected} (got {got})")
        pattern = pattern.to(self._device)
        _ = pattern.plan  # validates
        if self.is_causal and not pattern.is_causal:
            raise ValueError("PriorAttention.set_pattern: pattern must keep no pair above the diagonal (is_causal)")
        return pattern

    def compact(self, num_key_heads: int | None = None) -> Tensor:
        """Renumbers the keys so that those which no query keeps are gone.

        Afterwards :meth:`forward` takes only the rows ``keep`` of key and value, as ``fiak::compact_kv`` and
        ``fiak::compact_linear`` give them. A module cannot be pruned again after this.

        Args:
            num_key_heads: heads of key and value, by default as many as query heads.

        Returns:
            ``keep``, int64 ``[num_key_heads, K]``: the kept keys of each key head, ascending, padded with -1.

        Raises:
            RuntimeError: a module that is not pruned, or compacted already.
            ValueError: ``num_heads`` that is not a multiple of ``num_key_heads``.
        """
        pattern = self.pattern
        if pattern is None:
            raise RuntimeError("PriorAttention.compact: the module must be pruned first")
        if self.is_compacted:
            raise RuntimeError("PriorAttention.compact: the module is compacted already")
        pattern, keep = pattern.compact(num_key_heads)
        _ = pattern.plan
        self._adopt(pattern, keep)
        return keep

    def _forget(self) -> None:
        """Neither a pattern nor results of calibration."""
        for name in (*_PATTERN_STATE, *_CALIBRATION):
            setattr(self, name, None)
        self._plan, self._plan_versions = None, None

    # Tensors that a module keeps are made outside inference mode: autograd could not save those made inside.
    @torch.inference_mode(False)
    def _adopt(self, pattern: SparsePattern, keep: Tensor | None) -> None:
        """Takes copies of the pattern's indices; the plan, which nobody writes to, serves both."""
        self.prior = None
        self._forget()
        own = pattern.clone()
        self.pattern_crow_indices, self.pattern_col_indices = own.crow_indices, own.col_indices
        self._plan = pattern.plan
        self._plan_versions = own.crow_indices._version, own.col_indices._version
        self.keep = None if keep is None else keep.clone()

    @torch.inference_mode(False)
    def _restore_prior(self) -> None:
        """The state before pruning, with an initial prior."""
        device = self._device
        self._forget()
        if self.kind != "softmax":
            self.prior = nn.Parameter(torch.empty(self._prior_shape, device=device, dtype=self._place.dtype))
            self.reset_parameters()

    @property
    def _prior_shape(self) -> tuple[int, int, int, int]:
        return self.groups, self.num_heads, self.num_queries if self.kind == "fiak" else 1, self.num_keys

    def kept(self, num_keys: int) -> Tensor:
        """``keep`` for an input of ``num_keys`` keys, no wider than these; -1 in place of those that it does not have.

        Raises:
            RuntimeError: a module that is not compacted.
        """
        if self.keep is None:
            raise RuntimeError(f"PriorAttention.kept: the module must be compacted (got {self._state()})")
        if not may_be_shorter(num_keys, self.num_keys):
            return self.keep
        # They ascend, so what a short input has is among the first; compiled code serves every length.
        keep = self.keep if torch.compiler.is_compiling() else self.keep[:, :num_keys]
        return keep.masked_fill(keep >= num_keys, -1)

    # ---------------------------------------------------------------- attention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        kv_lens: Tensor | None = None,
        query_offsets: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attention of ``query`` to ``key`` and ``value``.

        Args:
            query: ``[B, num_heads, n, D]`` with n up to ``num_queries``.
            key: ``[B, H, m, D]`` with m up to ``num_keys``; ``num_heads`` is a multiple of H. Once compacted, the rows
                that :meth:`kept` names.
            value: ``[B, H, m, Dv]``, likewise.
            kv_lens: ``[B]``, the number of keys of each batch element; keys behind take no part. Once compacted it
                still counts all keys, and an input of fewer than ``num_keys`` needs it unless attention is causal.
            query_offsets: ``[B]``, the position of each element's first query (decoding with cached keys and values);
                0 by default.
            bias: what is added to the scores, with gradient: ``[1 | groups, num_heads, num_queries, num_keys]`` (Swin's
                relative positions and shifted windows), finite. Inputs are then as long as the module's sizes, and its
                columns are all keys, compacted or not.

        Returns:
            ``[B, num_heads, n, Dv]``, in the memory order ``[B, n, num_heads, Dv]``.

        Raises:
            ValueError: another number of heads, an input longer than the module's sizes, or a bias of another shape.
            RuntimeError: what the ops refuse.
        """
        self._check(query, key, bias)
        if self.recorder is not None:
            self.recorder(query, key, {"kv_lens": kv_lens, "query_offsets": query_offsets, "bias": bias})
        dropout_p = self.dropout_p if self.training else 0.0
        if self.is_pruned:
            return self._attend_pattern(query, key, value, kv_lens, query_offsets, bias, dropout_p)
        plain = self.kind == "softmax" and self.score == "dot"
        if plain and kv_lens is None and query_offsets is None and bias is None:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                dropout_p=dropout_p,
                is_causal=self.is_causal,
                scale=self.scale,
                enable_gqa=key.size(1) != self.num_heads,
            )
        weight, log_prior = self._dense_weight(query, key, query_offsets, bias)
        output: Tensor = torch.ops.fiak.prior_attention(
            query,
            key,
            value,
            weight,
            is_causal=self.is_causal and query_offsets is None,
            kv_lens=kv_lens,
            dropout_p=dropout_p,
            seed=_draw_seed(dropout_p, query.device),
            scale=self.scale,
            score=self.score,
            log_prior=log_prior,
        )
        return output

    def _check(self, query: Tensor, key: Tensor, bias: Tensor | None) -> None:
        for name, tensor in (("query", query), ("key", key)):
            if tensor.dim() != 4:
                raise ValueError(f"PriorAttention: {name} must have 4 dimensions (got shape {tuple(tensor.shape)})")
        if query.size(1) != self.num_heads:
            raise ValueError(f"PriorAttention: query must have {self.num_heads} heads (got {query.size(1)})")
        if query.size(2) > self.num_queries:
            raise ValueError(f"PriorAttention: query must have at most {self.num_queries} rows (got {query.size(2)})")
        if self.keep is not None:
            if key.size(1) != self.keep.size(0) or key.size(2) > self.keep.size(1):
                raise ValueError(
                    f"PriorAttention: key must be compacted to {self.keep.size(0)} heads of {self.keep.size(1)} rows "
                    f"(got {key.size(1)} heads of {key.size(2)} rows)"
                )
        elif key.size(2) > self.num_keys:
            raise ValueError(f"PriorAttention: key must have at most {self.num_keys} rows (got {key.size(2)})")
        if bias is not None:
            shape = (self.num_heads, self.num_queries, self.num_keys)
            if bias.dim() != 4 or bias.size(0) not in (1, self.groups) or bias.shape[1:] != shape:
                raise ValueError(
                    f"PriorAttention: bias must be [1 or {self.groups}, {', '.join(map(str, shape))}] "
                    f"(got shape {tuple(bias.shape)})"
                )
            if query.size(2) != self.num_queries or (self.keep is None and key.size(2) != self.num_keys):
                raise ValueError(
                    f"PriorAttention: query and key must have {self.num_queries} and {self.num_keys} rows where there "
                    f"is a bias (got {query.size(2)} and {key.size(2)})"
                )

    def _dense_weight(
        self, query: Tensor, key: Tensor, query_offsets: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor | None, bool]:
        """The weights as fiak::prior_attention takes them, and whether they are logarithms.

        Only the rows and columns of this input are looked at: weights are relative, so that the normalisation of a
        softmax, or the largest prior or bias of a row, is left to the op, which knows what is visible.
        """
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        batch, _, queries, _ = query.shape
        keys = key.size(2)
        rows = None
        if query_offsets is not None:
            rows = query_offsets.unsqueeze(-1) + torch.arange(queries, device=query.device)  # [B, n]

        def of_input(x: Tensor) -> Tensor:
            x = first_of(x, 3, keys)
            if rows is not None and x.size(2) > 1:
                group = torch.arange(batch, device=query.device) % x.size(0)
                return x[group.unsqueeze(-1), :, rows].transpose(1, 2).to(dtype)
            return (x if x.size(2) == 1 else first_of(x, 2, queries)).to(dtype)

        are_logs = self.prior is None or self.parameterization == "logits" or bias is not None
        weight = None if self.prior is None else of_input(self.prior)
        if weight is not None and self.parameterization == "clamp":
            weight = _at_most_one(weight.abs())
            if are_logs:  # a prior of 0 has no gradient, as |0| has none
                absent = weight == 0
                weight = weight.masked_fill(absent, 1.0).log().masked_fill(absent, -torch.inf)
        if bias is not None:
            weight = of_input(bias) if weight is None else weight + of_input(bias)
        if rows is not None and self.is_causal:
            # The op aligns causality with the first row; rows from elsewhere carry it in their weights.
            hidden = (torch.arange(keys, device=query.device) > rows.unsqueeze(-1)).unsqueeze(1)
            if weight is None:
                weight = torch.zeros(hidden.shape, dtype=dtype, device=query.device)
            elif weight.size(0) not in (1, batch):
                weight = weight[torch.arange(batch, device=query.device) % weight.size(0)]
            weight = weight.masked_fill(hidden, -torch.inf if are_logs else 0.0)
        return weight, are_logs

    def _attend_pattern(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_lens: Tensor | None,
        query_offsets: Tensor | None,
        bias: Tensor | None,
        dropout_p: float,
    ) -> Tensor:
        """Pruned attention. A shorter input uses the pattern's first rows and columns without a pattern of its own."""
        self._follow(query.device)
        pattern = self.pattern
        assert pattern is not None
        if not torch.compiler.is_exporting():  # which has no tensors to keep
            self._plan, self._plan_versions = pattern.plan, pattern._plan_versions
        batch, _, queries, _ = query.shape
        keys = key.size(2)
        if self.keep is not None:
            if kv_lens is not None:
                keep = self.keep[:, :keys]
                kv_lens = ((keep >= 0) & (keep < kv_lens[:, None, None])).sum(-1)
        elif kv_lens is not None and may_be_shorter(keys, self.num_keys):
            kv_lens = kv_lens.clamp(max=keys)
        if query_offsets is None and may_be_shorter(queries, self.num_queries):
            query_offsets = torch.zeros(batch, dtype=torch.int64, device=query.device)
        prior = None
        if bias is not None:
            weight_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
            prior = pattern.entries(bias, self.keep).to(weight_dtype)
        return pattern.attend(
            query,
            key,
            value,
            prior,
            query_offsets=query_offsets,
            kv_lens=kv_lens,
            dropout_p=dropout_p,
            seed=_draw_seed(dropout_p, query.device),
            scale=self.scale,
            score=self.score,
            log_prior=prior is not None,
        )

    # ---------------------------------------------------------------- copies, moves and checkpoints

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None, "_plan_versions": None}  # plans are made, never copied or saved

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PriorAttention:
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
        if self._plan is not None and self._plan.device != device:
            self._plan = None
        for name in (*_PATTERN_STATE, *_CALIBRATION):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != device:
                with torch.inference_mode(False):
                    setattr(self, name, tensor.to(device))

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

    @property
    def _device(self) -> torch.device:
        tensor = self.pattern_crow_indices if self.prior is None else self.prior
        return (self._place if tensor is None else tensor).device

    def extra_repr(self) -> str:
        parts = [f"{self.num_heads}, {self.num_queries}, {self.num_keys}, kind={self.kind!r}", self._state()]
        if self.kind != "softmax":
            parts.append(f"parameterization={self.parameterization!r}")
        for name, default in (
            ("is_causal", False),
            ("score", "dot"),
            ("scale", None),
            ("dropout_p", 0.0),
            ("groups", 1),
        ):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)

    def _state(self) -> str:
        pattern = self.pattern
        if pattern is None:
            return "dense"
        return f"{'compacted' if self.is_compacted else 'pruned'} to {pattern.nnz} pairs"


class MultiHeadSelfAttention(nn.Module):
    """Self-attention with projections around :class:`PriorAttention`.

    Args:
        dim: features of the input and the output.
        num_heads: heads.
        num_tokens: the longest input.
        head_dim: features of each head, by default ``dim / num_heads``.
        qkv_bias: whether the input projections have a bias.
        proj_bias: whether the output projection has one.
        **attention: further arguments of :class:`PriorAttention`.

    Attributes:
        qkv: the input projections in one: queries, keys, values.
        prior_attention: the :class:`PriorAttention`.
        proj: the output projection.

    Raises:
        ValueError: ``dim`` that is not a multiple of ``num_heads`` where ``head_dim`` is left out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        **attention: Any,
    ) -> None:
        super().__init__()
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(
                    "MultiHeadSelfAttention: dim must be a multiple of num_heads where head_dim is left out "
                    f"(got {dim} and {num_heads})"
                )
            head_dim = dim // num_heads
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_tokens = num_tokens
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim, bias=qkv_bias)
        self.prior_attention = PriorAttention(num_heads, num_tokens, **attention)
        self.proj = nn.Linear(num_heads * head_dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, kv_lens: Tensor | None = None) -> Tensor:
        """Maps ``x [B, n, dim]``, n up to ``num_tokens``, to ``[B, n, dim]``.

        Args:
            x: the tokens.
            kv_lens: ``[B]``, the number of tokens of each batch element; those behind are not attended.

        Raises:
            ValueError: an input longer than ``num_tokens``.
        """
        batch, tokens, _ = x.shape
        if tokens > self.num_tokens:
            raise ValueError(f"MultiHeadSelfAttention: x must have at most {self.num_tokens} tokens (got {tokens})")
        keep = None
        if self.prior_attention.is_compacted:
            keep = self.prior_attention.kept(tokens)
            if kv_lens is None and not self.prior_attention.is_causal and may_be_shorter(tokens, self.num_tokens):
                kv_lens = torch.full((batch,), tokens, device=x.device)
        query, key, value = project_qkv(self.qkv, x, self.num_heads, keep, head_dim=self.head_dim, owner=self)
        return self.proj(self.prior_attention(query, key, value, kv_lens=kv_lens).transpose(1, 2).flatten(2))

    def compact(self) -> None:
        """Projects keys and values of the positions only that some query of a head keeps.

        Outputs change by rounding only. Parameters stay as they are, and so do optimizers.

        Raises:
            RuntimeError: attention that is not pruned, or compacted already.
        """
        self.prior_attention.compact()


def may_be_shorter(size: int, longest: int) -> bool:
    """Whether an input is shorter than it may be. Compiled code does not look, so that it serves every length."""
    return torch.compiler.is_compiling() or size < longest


def first_of(x: Tensor, dim: int, size: int) -> Tensor:
    """The first ``size`` entries along ``dim``. Compiled code gathers them, as slices ask whether these are all."""
    if torch.compiler.is_compiling():
        return x.index_select(dim, torch.arange(size, device=x.device))
    return x.narrow(dim, 0, size)


def _at_most_one(x: Tensor) -> Tensor:
    """``min(x, 1)`` with gradient at 1, where causal priors start; that of torch.clamp is 0 there from 2.14 on."""
    return x.masked_fill(x > 1, 1.0)


def _draw_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """A seed from torch's generator, as the ops take it."""
    return torch.randint(2**63 - 1, (1,), device=device) if dropout_p > 0 else None


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
