"""Attention with learned priors over its (query, key) pairs, and the same attention once it is pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fiak_ext import ops
from fiak_ext.nn.lengths import first_of, may_be_shorter
from fiak_ext.nn.state import Kind, PriorState
from fiak_ext.ops import Score
from fiak_ext.pattern import SparsePattern, check_size

__all__ = ["Parameterization", "PriorAttention"]

Parameterization = Literal["logits", "clamp"]


class PriorAttention(PriorState):
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
        super().__init__(num_heads, num_queries, num_keys, groups, kind)
        self.parameterization = parameterization
        self.is_causal = is_causal
        self.score = score
        self.scale = scale
        self.dropout_p = dropout_p
        self.recorder: Callable[[Tensor, Tensor, Mapping[str, Any]], None] | None = None
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

        Afterwards :meth:`forward` takes only the rows ``keep`` of key and value, as ``ops.compact_kv`` and
        ``ops.compact_linear`` give them. A module cannot be pruned again after this.

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
        return ops.prior_attention(
            query,
            key,
            value,
            weight,
            is_causal=self.is_causal and query_offsets is None,
            kv_lens=kv_lens,
            dropout_p=dropout_p,
            scale=self.scale,
            score=self.score,
            log_prior=log_prior,
        )

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
        """The weights as ``ops.prior_attention`` takes them, and whether they are logarithms.

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
            self._plan = pattern._made_plan()
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
        return ops.csr_attention(
            query,
            key,
            value,
            pattern,
            prior,
            query_offsets=query_offsets,
            kv_lens=kv_lens,
            dropout_p=dropout_p,
            scale=self.scale,
            score=self.score,
            log_prior=prior is not None,
        )

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


def _at_most_one(x: Tensor) -> Tensor:
    """``min(x, 1)`` with gradient at 1, where causal priors start; that of torch.clamp is 0 there from 2.14 on."""
    return x.masked_fill(x > 1, 1.0)
