"""Static sparse attention patterns: which (query, key) pairs each head keeps, shared by the whole batch."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fiak_ext import _C

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["SparsePattern"]


class Plan(NamedTuple):
    """A plan, its summary where kernels run on another device than the host, and the versions of its indices."""

    plan: Tensor
    summary: Tensor | None
    versions: tuple[int, int] | None


class SparsePattern:
    """The pairs that every head keeps, as one CSR matrix of ``groups * num_heads * num_queries`` rows.

    Row ``(g * num_heads + h) * num_queries + i`` holds the keys of query ``i`` of head ``h`` in group ``g``, ascending
    and without duplicates; batch element ``b`` uses group ``b % groups``. With one group this is a
    ``torch.sparse_csr_tensor`` of size ``(num_heads * num_queries, num_keys)``. Patterns are values: no method changes
    one in place, and equality compares sizes and content, wherever the tensors lie.

    A pattern that all heads share (:attr:`shared_heads`) is stored once: it has ``groups * num_queries`` rows, which
    every head of a group reads.

    Args:
        crow_indices: ``[groups * num_heads * num_queries + 1]`` row offsets, int32 or int64, or
            ``[groups * num_queries + 1]`` of a pattern that all heads share.
        col_indices: ``[nnz]`` keys, int32 or int64, on the same device.
        num_heads: query heads.
        num_queries: rows of each head.
        num_keys: columns.
        groups: patterns that the batch elements use in turn (Swin's shifted windows); 1 in most models.

    Raises:
        TypeError: indices that are not int32 or int64 tensors.
        ValueError: a size or a length that does not fit; what the indices say is validated by :attr:`plan`, that is
            by :meth:`from_csr` at once and otherwise before the first attention.
    """

    __slots__ = (
        "_plan",
        "col_indices",
        "crow_indices",
        "groups",
        "num_heads",
        "num_keys",
        "num_queries",
    )

    def __init__(
        self,
        crow_indices: Tensor,
        col_indices: Tensor,
        num_heads: int,
        num_queries: int,
        num_keys: int,
        groups: int = 1,
    ) -> None:
        for name, size, least in (
            ("num_heads", num_heads, 1),
            ("num_queries", num_queries, 0),
            ("num_keys", num_keys, 0),
            ("groups", groups, 1),
        ):
            check_size("SparsePattern", name, size, least)
        for name, indices in (("crow_indices", crow_indices), ("col_indices", col_indices)):
            if indices.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"SparsePattern: {name} must be int32 or int64 (got {indices.dtype})")
            if indices.dim() != 1:
                raise ValueError(f"SparsePattern: {name} must have one dimension (got shape {tuple(indices.shape)})")
        if crow_indices.device != col_indices.device:
            raise ValueError(
                "SparsePattern: col_indices must be on the device of crow_indices, "
                f"{crow_indices.device} (got {col_indices.device})"
            )
        length = groups * num_heads * num_queries + 1
        shared_length = groups * num_queries + 1
        if crow_indices.numel() not in (length, shared_length):
            lengths = f"{length}" if length == shared_length else f"{shared_length} or {length}"
            raise ValueError(
                "SparsePattern: crow_indices must have groups * [1 | num_heads] * num_queries + 1 = "
                f"{lengths} elements (got {crow_indices.numel()})"
            )
        if crow_indices.numel() != length and groups % num_heads == 0:  # the op would take groups for heads
            raise ValueError(
                "SparsePattern: groups must not be a multiple of num_heads where all heads share a pattern "
                f"(got {groups} groups, {num_heads} heads)"
            )
        dtype = torch.promote_types(crow_indices.dtype, col_indices.dtype)
        self.crow_indices = _outside_inference(crow_indices.to(dtype).contiguous())
        self.col_indices = _outside_inference(col_indices.to(dtype).contiguous())
        self.num_heads = num_heads
        self.num_queries = num_queries
        self.num_keys = num_keys
        self.groups = groups
        self._plan: Plan | None = None

    # ---------------------------------------------------------------- from and to other forms

    @classmethod
    def from_mask(cls, mask: Tensor, num_heads: int | None = None) -> SparsePattern:
        """The pattern of a boolean mask ``[heads, N, M]`` or ``[groups, heads, N, M]``, True where kept.

        Args:
            mask: of ``num_heads`` heads, or of one that all of them share.
            num_heads: by default the mask's.

        Raises:
            TypeError: a mask that is not boolean.
            ValueError: another number of dimensions or heads.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"SparsePattern.from_mask: mask must be bool, True where kept (got {mask.dtype})")
        if mask.dim() == 3:
            mask = mask.unsqueeze(0)
        if mask.dim() != 4:
            raise ValueError(
                "SparsePattern.from_mask: mask must be [heads, N, M] or [groups, heads, N, M] "
                f"(got shape {tuple(mask.shape)})"
            )
        groups, heads, num_queries, num_keys = mask.shape
        num_heads = heads if num_heads is None else num_heads
        if heads not in (1, num_heads):
            raise ValueError(
                f"SparsePattern.from_mask: mask must have 1 or num_heads = {num_heads} heads (got {heads})"
            )
        rows = mask.reshape(groups * heads * num_queries, num_keys)
        pattern = cls(_offsets(rows.sum(1)), rows.nonzero()[:, 1], num_heads, num_queries, num_keys, groups)
        return pattern._narrow()

    @classmethod
    def from_window(
        cls,
        num_heads: int,
        num_queries: int,
        num_keys: int | None = None,
        *,
        window_size: tuple[int, int],
        num_sinks: int = 0,
        is_causal: bool = False,
    ) -> SparsePattern:
        """The pattern of a sliding window, with attention sinks, alike for all heads; no mask is made.

        Query i keeps the keys ``i - left <= j <= i + right`` and the first ``num_sinks`` keys, of these, if causal,
        those with ``j <= i``. Takes time and memory in proportion to the pairs kept::

            SparsePattern.from_window(8, 32768, window_size=(255, 0), num_sinks=4, is_causal=True)

        Args:
            num_heads: query heads.
            num_queries: rows of each head.
            num_keys: columns, by default ``num_queries``.
            window_size: (left, right), the keys before and behind the query's own position; -1 for all of them.
            num_sinks: keys at the start that every query keeps.
            is_causal: whether no query keeps a key behind its own position.

        Raises:
            ValueError: a size that is no integer or too small.
        """
        num_keys = num_queries if num_keys is None else num_keys
        for name, size, least in (
            ("num_heads", num_heads, 1),
            ("num_queries", num_queries, 0),
            ("num_keys", num_keys, 0),
            ("window_size[0]", window_size[0], -1),
            ("window_size[1]", window_size[1], -1),
            ("num_sinks", num_sinks, 0),
        ):
            check_size("SparsePattern.from_window", name, size, least)
        left, right = (num_queries + num_keys if size == -1 else size for size in window_size)
        query = torch.arange(num_queries)
        last = (query + 1 if is_causal else torch.full_like(query, num_keys)).clamp(max=num_keys)
        sinks = last.clamp(max=num_sinks)
        start = torch.maximum(query - left, sinks)
        stop = torch.minimum(query + right + 1, last)
        starts = torch.stack([torch.zeros_like(sinks), start], 1).flatten()
        lengths = torch.stack([sinks, (stop - start).clamp(min=0)], 1).flatten()
        head = cls._from_runs(query.repeat_interleave(2), starts, lengths, 1, num_queries, num_keys)
        return head._for_heads(num_heads)

    @classmethod
    def from_blocks(
        cls,
        blocks: Tensor,
        block_size: tuple[int, int],
        num_queries: int,
        num_keys: int | None = None,
        *,
        is_causal: bool = False,
    ) -> SparsePattern:
        """The pattern of a mask of blocks, True where all pairs of the block are kept; no mask of pairs is made.

        Args:
            blocks: bool ``[num_heads, ceil(num_queries / block_size[0]), ceil(num_keys / block_size[1])]``, or the same
                with groups in front.
            block_size: queries and keys of a block; those at the end of rows and columns are cut off there.
            num_queries: rows of each head.
            num_keys: columns, by default ``num_queries``.
            is_causal: whether pairs ``j > i`` are left out.

        Raises:
            TypeError: blocks that are not boolean.
            ValueError: a size below 1 or no integer, or blocks of another shape.
        """
        num_keys = num_queries if num_keys is None else num_keys
        for name, size in (
            ("block_size[0]", block_size[0]),
            ("block_size[1]", block_size[1]),
            ("num_queries", num_queries),
            ("num_keys", num_keys),
        ):
            check_size("SparsePattern.from_blocks", name, size, 1)
        if blocks.dtype != torch.bool:
            raise TypeError(f"SparsePattern.from_blocks: blocks must be bool, True where kept (got {blocks.dtype})")
        shape = tuple(-(-size // block) for size, block in zip((num_queries, num_keys), block_size, strict=True))
        if blocks.dim() not in (3, 4) or tuple(blocks.shape[-2:]) != shape:
            raise ValueError(
                f"SparsePattern.from_blocks: blocks must be [heads, {shape[0]}, {shape[1]}] or [groups, heads, "
                f"{shape[0]}, {shape[1]}] (got shape {tuple(blocks.shape)})"
            )
        groups, num_heads = (1, *blocks.shape[:-2])[-2:]
        block_row, block = blocks.reshape(-1, shape[1]).nonzero(as_tuple=True)
        counts = torch.bincount(block_row, minlength=groups * num_heads * shape[0])
        # A row has a run for each kept block of its row of blocks.
        query = torch.arange(num_queries, device=blocks.device) // block_size[0]
        of_row = (torch.arange(groups * num_heads, device=blocks.device)[:, None] * shape[0] + query).flatten()
        row = torch.arange(of_row.numel(), device=blocks.device).repeat_interleave(counts[of_row])
        first_run, first_block = (_offsets(count)[:-1] for count in (counts[of_row], counts))
        place = first_block[of_row[row]] + torch.arange(row.numel(), device=blocks.device) - first_run[row]
        start = block[place] * block_size[1]
        end = (row % num_queries + 1).clamp(max=num_keys) if is_causal else torch.full_like(row, num_keys)
        length = (end - start).clamp(0, block_size[1])
        return cls._from_runs(row, start, length, num_heads, num_queries, num_keys, groups)

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask, num_heads: int | None = None) -> SparsePattern:
        """The pattern of a ``torch.nn.attention.flex_attention.BlockMask``, exact in blocks that it keeps partly.

        Its batch elements become groups. Time and memory go with the pairs of the blocks that it keeps::

            SparsePattern.from_block_mask(create_block_mask(mask_mod, None, 8, 4096, 4096, device="cpu"))

        Args:
            block_mask: of any block size.
            num_heads: query heads, by default as many as the mask has; any number if it has one.

        Raises:
            ValueError: another number of heads than the mask's.
        """
        groups, mask_heads = block_mask.kv_num_blocks.shape[:2]
        num_heads = mask_heads if num_heads is None else num_heads
        if mask_heads not in (1, num_heads):
            raise ValueError(
                f"SparsePattern.from_block_mask: num_heads must be the mask's {mask_heads} (got {num_heads})"
            )
        (num_queries, num_keys), block_size = block_mask.seq_lengths, block_mask.BLOCK_SIZE
        keys = []
        for counts, indices, whole in (
            (block_mask.kv_num_blocks, block_mask.kv_indices, False),
            (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True),
        ):
            if counts is None or indices is None:
                continue
            place = torch.arange(indices.size(3), device=indices.device)
            group, head, row, order = (place < counts.unsqueeze(-1)).nonzero(as_tuple=True)
            column = indices[group, head, row, order].long()
            query, key = (torch.arange(size, device=indices.device) for size in block_size)
            query = (row[:, None] * block_size[0] + query)[:, :, None]
            key = (column[:, None] * block_size[1] + key)[:, None]
            inside = (query < num_queries) & (key < num_keys)
            which, _, _ = inside.nonzero(as_tuple=True)
            group, head = group[which], head[which]
            query, key = (index.expand_as(inside)[inside] for index in (query, key))
            entry = ((group * mask_heads + head) * num_queries + query) * num_keys + key
            if not whole:
                entry = entry[torch.vmap(block_mask.mask_mod)(group, head, query, key)]
            keys.append(entry)
        entries = torch.cat(keys).sort().values
        counts = torch.bincount(entries // max(num_keys, 1), minlength=groups * mask_heads * num_queries)
        pattern = cls(_offsets(counts), entries % max(num_keys, 1), mask_heads, num_queries, num_keys, groups)
        return pattern._narrow() if mask_heads == num_heads else pattern._for_heads(num_heads)

    @classmethod
    def _from_runs(
        cls,
        row: Tensor,
        start: Tensor,
        length: Tensor,
        num_heads: int,
        num_queries: int,
        num_keys: int,
        groups: int = 1,
    ) -> SparsePattern:
        """The pattern that keeps ``length`` keys from ``start`` on in ``row``, for each run; in ascending order."""
        counts = torch.zeros(groups * num_heads * num_queries, dtype=torch.int64, device=row.device)
        counts.index_add_(0, row, length)
        total = int(length.sum())
        shift = (start - _offsets(length)[:-1]).repeat_interleave(length, output_size=total)
        columns = shift.add_(torch.arange(total, device=row.device))
        return cls(_offsets(counts), columns, num_heads, num_queries, num_keys, groups)._narrow()

    def _for_heads(self, num_heads: int) -> SparsePattern:
        """This pattern of one head, for ``num_heads`` alike."""
        if self.num_queries and self.groups % num_heads:  # the op takes it as one that all heads share
            return SparsePattern(
                self.crow_indices, self.col_indices, num_heads, self.num_queries, self.num_keys, self.groups
            )
        counts = self.crow_indices.diff().view(self.groups, 1, self.num_queries)
        ends = self.crow_indices[:: self.num_queries].tolist() if self.num_queries else [0] * (self.groups + 1)
        parts = [self.col_indices[start:stop].repeat(num_heads) for start, stop in pairwise(ends)]
        crow = _offsets(counts.expand(-1, num_heads, -1).flatten())
        return SparsePattern(crow, torch.cat(parts), num_heads, self.num_queries, self.num_keys, self.groups)._narrow()

    @classmethod
    def from_csr(
        cls,
        crow_indices: Tensor,
        col_indices: Tensor,
        num_heads: int,
        num_queries: int,
        num_keys: int,
        groups: int = 1,
    ) -> SparsePattern:
        """A pattern from indices of any origin, which are validated at once; the arguments are those of the class.

        The indices are kept as int32 where their values fit.

        Raises:
            TypeError, ValueError: as the class does.
            RuntimeError: offsets that do not start at 0, decrease or do not end at nnz; columns out of range, unsorted
                or duplicated.
        """
        pattern = cls(crow_indices, col_indices, num_heads, num_queries, num_keys, groups)
        _ = pattern.plan
        return pattern._narrow()

    @classmethod
    def from_torch_csr(cls, matrix: Tensor, num_heads: int, groups: int = 1) -> SparsePattern:
        """The pattern of a sparse CSR tensor ``[groups * num_heads * N, M]``; its values are not looked at.

        Raises:
            ValueError: a tensor that is not such a matrix.
            RuntimeError: unsorted or duplicated columns.
        """
        if matrix.layout != torch.sparse_csr or matrix.dim() != 2:
            raise ValueError(
                "SparsePattern.from_torch_csr: matrix must be a sparse CSR matrix "
                f"(got {matrix.layout}, shape {tuple(matrix.shape)})"
            )
        rows, num_keys = matrix.shape
        if num_heads < 1 or groups < 1 or rows % (num_heads * groups):
            raise ValueError(
                "SparsePattern.from_torch_csr: the number of rows must be a multiple of groups * num_heads "
                f"(got {rows} rows, {groups} groups, {num_heads} heads)"
            )
        num_queries = rows // (num_heads * groups)
        return cls.from_csr(matrix.crow_indices(), matrix.col_indices(), num_heads, num_queries, num_keys, groups)

    def to_mask(self) -> Tensor:
        """Boolean ``[groups, num_heads, num_queries, num_keys]``, True where kept."""
        mask = torch.zeros(self._num_rows, self.num_keys, dtype=torch.bool, device=self.device)
        mask[self._entry_rows(), self.col_indices.long()] = True
        return self._of_heads(mask.view(self.groups, self._pattern_heads, self.num_queries, self.num_keys))

    def to_torch_csr(self, values: Tensor | None = None) -> Tensor:
        """A sparse CSR tensor ``[groups * num_heads * num_queries, num_keys]`` with ``values [nnz]``, or float32 ones.

        Of a pattern that all heads share it has ``groups * num_queries`` rows.

        Raises:
            ValueError: values of another shape.
        """
        if values is None:
            values = torch.ones(self.nnz, device=self.device)
        if values.shape != (self.nnz,):
            raise ValueError(
                f"SparsePattern.to_torch_csr: values must have shape ({self.nnz},) (got {tuple(values.shape)})"
            )
        size = (self._num_rows, self.num_keys)
        return torch.sparse_csr_tensor(self.crow_indices, self.col_indices, values, size=size, check_invariants=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors: ``crow_indices``, ``col_indices`` and ``sizes`` (groups, heads, queries, keys)."""
        sizes = torch.tensor([self.groups, self.num_heads, self.num_queries, self.num_keys])
        return {"crow_indices": self.crow_indices, "col_indices": self.col_indices, "sizes": sizes}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> SparsePattern:
        """The inverse of :meth:`state_dict`, validated like :meth:`from_csr`.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: a state that is not that of a pattern.
        """
        groups, num_heads, num_queries, num_keys = state["sizes"].tolist()
        return cls.from_csr(state["crow_indices"], state["col_indices"], num_heads, num_queries, num_keys, groups)

    # ---------------------------------------------------------------- what it holds

    @property
    def shared_heads(self) -> bool:
        """Whether all heads share one pattern, which is stored once."""
        return self._pattern_heads < self.num_heads

    @property
    def nnz(self) -> int:
        """The number of pairs stored: those kept, over all heads and groups, but one head's where all share them."""
        return self.col_indices.numel()

    @property
    def device(self) -> torch.device:
        """Where the indices lie."""
        return self.crow_indices.device

    @property
    def num_bytes(self) -> int:
        """The bytes of the two index tensors, which is what a checkpoint holds."""
        return self.crow_indices.nbytes + self.col_indices.nbytes

    @property
    def density(self) -> float:
        """The share of all pairs that is kept; 0 for a pattern without pairs."""
        return self.nnz / max(self._num_rows * self.num_keys, 1)

    def density_per_head(self) -> Tensor:
        """float64 ``[groups, num_heads]``: the share of each head's pairs that is kept."""
        entries = torch.bincount(self._entry_heads(), minlength=self.groups * self._pattern_heads)
        density = entries.double() / max(self.num_queries * self.num_keys, 1)
        return self._of_heads(density.view(self.groups, self._pattern_heads))

    @property
    def is_causal(self) -> bool:
        """Whether every pair (i, j) has ``j <= i``; looks at the last pair of each row only."""
        ends = self.crow_indices[1:].long()
        rows = (self.crow_indices.diff() > 0).nonzero()[:, 0]
        return bool((self.col_indices[ends[rows] - 1] <= rows % max(self.num_queries, 1)).all())

    def empty_rows(self) -> Tensor:
        """bool ``[groups, num_heads, num_queries]``: queries that keep no key, whose output is 0."""
        empty = self.crow_indices.diff() == 0
        return self._of_heads(empty.view(self.groups, self._pattern_heads, self.num_queries))

    def empty_columns(self) -> Tensor:
        """bool ``[groups, num_heads, num_keys]``: keys that no query keeps."""
        return self._of_heads(~self._used_columns().view(self.groups, self._pattern_heads, self.num_keys))

    @property
    def plan(self) -> Tensor:
        """The uint8 execution plan that the kernels read, made on first use and never saved (see ``fiak::csr_plan``).

        It is made anew where the indices were written to in place since.

        Raises:
            RuntimeError: indices that are not a well-formed pattern.
        """
        return self._made_plan().plan

    def _made_plan(self) -> Plan:
        # Compiled code does not look whether indices were written to since.
        compiling = torch.compiler.is_compiling()
        versions = None if compiling else (self.crow_indices._version, self.col_indices._version)
        if self._plan is None or (versions is not None and versions != self._plan.versions):
            # Autograd cannot save inference tensors, and a plan outlives the mode that happens to be on now.
            with torch.inference_mode(False):
                plan = torch.ops.fiak.csr_plan(self.crow_indices, self.col_indices, self.num_queries, self.num_keys)
                summary = None
                if plan.is_cuda and not compiling:  # the host of a CPU reads the plan itself
                    summary = torch.ops.fiak.csr_plan_summary(plan, self.groups * self._pattern_heads)
            self._plan = Plan(plan, summary, versions)
        return self._plan

    # ---------------------------------------------------------------- other patterns from it

    def crop(self, num_queries: int, num_keys: int | None = None) -> SparsePattern:
        """The pattern of the first queries and keys, for a shorter input.

        ``num_keys`` defaults to ``num_queries`` for a square pattern. The result's density is its own: under per-layer
        ranking short prefixes are denser than the whole.

        Raises:
            ValueError: a size beyond the pattern's, or ``num_keys`` left out where the pattern is not square.
        """
        if num_keys is None:
            if self.num_queries != self.num_keys:
                raise ValueError(
                    "SparsePattern.crop: num_keys must be given for a pattern that is not square "
                    f"(got {self.num_queries} queries, {self.num_keys} keys)"
                )
            num_keys = num_queries
        if not 0 <= num_keys <= self.num_keys:
            raise ValueError(f"SparsePattern.crop: num_keys must be in 0..{self.num_keys} (got {num_keys})")
        if not 0 <= num_queries <= self.num_queries:
            raise ValueError(f"SparsePattern.crop: num_queries must be in 0..{self.num_queries} (got {num_queries})")
        return self._select(0, num_queries, num_keys)

    def rows(self, start: int, stop: int) -> SparsePattern:
        """The pattern of queries ``start`` to ``stop - 1`` over all keys, for decoding with cached keys and values.

        Raises:
            ValueError: rows that are not the pattern's.
        """
        if not 0 <= start <= stop <= self.num_queries:
            raise ValueError(
                f"SparsePattern.rows: start and stop must be 0 <= start <= stop <= {self.num_queries} "
                f"(got {start}, {stop})"
            )
        return self._select(start, stop, self.num_keys)

    def compact(self, num_key_heads: int | None = None) -> tuple[SparsePattern, Tensor]:
        """Drops the keys that no query keeps and renumbers the others.

        A key stays for a key head if any group and any query head that reads this key head keeps it (query head ``h``
        reads key head ``h // (num_heads / num_key_heads)``).

        Args:
            num_key_heads: key heads, by default as many as query heads.

        Returns:
            The pattern over ``K`` keys, ``K`` being the most that a key head needs, and ``keep`` int64
            ``[num_key_heads, K]``: the old number of each new key, ascending, padded at the end with -1.

        Raises:
            ValueError: ``num_heads`` that is not a multiple of ``num_key_heads``.
        """
        key_heads = self.num_heads if num_key_heads is None else num_key_heads
        if key_heads < 1 or self.num_heads % key_heads:
            raise ValueError(
                "SparsePattern.compact: num_key_heads must divide the number of heads "
                f"(got {key_heads} key heads, {self.num_heads} heads)"
            )
        readers = self.num_heads // key_heads
        used_keys = self._used_columns().view(self.groups, self._pattern_heads, self.num_keys)
        used = self._of_heads(used_keys).unflatten(1, (key_heads, readers)).any(2).any(0)
        new_key = used.cumsum(1) - 1
        num_kept = int(used.sum(1).max()) if self.num_keys else 0
        keep = torch.full((key_heads, num_kept), -1, dtype=torch.int64, device=self.device)
        head, key = used.nonzero(as_tuple=True)
        keep[head, new_key[head, key]] = key
        entry_head = self._entry_heads() % self._pattern_heads // readers
        columns = new_key[entry_head, self.col_indices.long()]
        return self._like(self.crow_indices, columns, self.num_queries, num_kept), keep

    def to(self, device: torch.device | str | int) -> SparsePattern:
        """This pattern on a device: itself if it is there already; the plan is made anew there."""
        crow, col = self.crow_indices.to(device), self.col_indices.to(device)
        if crow is self.crow_indices:
            return self
        return self._like(crow, col, self.num_queries, self.num_keys)

    def clone(self) -> SparsePattern:
        """A copy with tensors of its own."""
        return self._like(self.crow_indices.clone(), self.col_indices.clone(), self.num_queries, self.num_keys)

    # ---------------------------------------------------------------- attention

    def entries(self, bias: Tensor, keep: Tensor | None = None) -> Tensor:
        """``bias`` of the kept pairs, ``[nnz]``: what :meth:`attend` takes as ``prior`` with ``log_prior``.

        This is how an additive bias, the logarithm of a weight, joins attention.

        Args:
            bias: ``[1 | groups, num_heads, num_queries, num_keys]``; with ``keep``, over all keys. Of one head
                where all share the pattern, which has one weight for each of its pairs.
            keep: of :meth:`compact`, where this pattern is what it returned.

        Raises:
            ValueError: a bias of several heads for a pattern that all heads share: ``from_mask(to_mask())`` is the same
                pattern with pairs of its own for each head.
        """
        if bias.size(1) != self._pattern_heads:
            remedy = "; SparsePattern.from_mask(pattern.to_mask()) has pairs of its own for each head"
            raise ValueError(
                f"SparsePattern.entries: bias must have the pattern's {self._pattern_heads} heads "
                f"(got shape {tuple(bias.shape)}){remedy if self.shared_heads else ''}"
            )
        rows, columns = self._entry_rows(), self.col_indices.long()
        if keep is not None:
            head = rows // max(self.num_queries, 1) % self._pattern_heads
            columns = keep[head // (self.num_heads // keep.size(0)), columns]
        return bias.expand(self.groups, -1, -1, -1).flatten(0, 2)[rows, columns]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prior: Tensor | None = None,
        *,
        query_offsets: Tensor | None = None,
        kv_lens: Tensor | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        scale: float | None = None,
        score: str = "dot",
        log_prior: bool = False,
    ) -> Tensor:
        """Attention over the pairs of this pattern only: ``fiak::csr_attention`` with its plan.

        ``fiak_ext.ops.csr_attention`` calls this method; it takes a mask as well, and draws a seed.

        Args:
            query: ``[B, num_heads, N, D]``, N = ``num_queries`` unless ``query_offsets`` says which rows these are.
            key: ``[B, H, M, D]``; num_heads is a multiple of H. Keys from M to ``num_keys - 1`` are hidden.
            value: ``[B, H, M, Dv]``.
            prior: weights ``[nnz]`` with gradient, float32 (float64 with float64 inputs), or None for all ones.
            query_offsets: ``[B]``: query n of element b uses row ``n + query_offsets[b]``.
            kv_lens: the number of keys ``[B]`` of each batch element, or ``[B, H]`` of each of its key heads, as
                compaction needs; keys behind are never read.
            dropout_p: probability of dropping a normalised weight; needs ``seed``, an int64 tensor of one element.
            scale: factor of the scores, by default ``1 / sqrt(D)``.
            score: ``"dot"`` or ``"gaussian"``.
            log_prior: ``prior`` holds the weights' logarithms; -inf is a weight of 0.

        Returns:
            ``[B, num_heads, N, Dv]``; 0 for a query without keys.

        Raises:
            ValueError: a query with another number of heads.
            RuntimeError: what the op refuses.
        """
        if query.dim() != 4 or query.size(1) != self.num_heads:
            raise ValueError(
                f"SparsePattern.attend: query must be [batch, {self.num_heads}, queries, head_dim] "
                f"(got shape {tuple(query.shape)})"
            )
        lens_of_heads = kv_lens is not None and kv_lens.dim() == 2
        if lens_of_heads and self.shared_heads and self.groups > 1:  # elements of a group would no longer take turns
            pattern, entries = self._of_each_head()
            return pattern.attend(
                query,
                key,
                value,
                None if prior is None else prior[entries],
                query_offsets=query_offsets,
                kv_lens=kv_lens,
                dropout_p=dropout_p,
                seed=seed,
                scale=scale,
                score=score,
                log_prior=log_prior,
            )
        if kv_lens is not None and lens_of_heads:
            batch, _, queries, _ = query.shape
            # Heads become batch elements and their patterns groups: the rows of the CSR matrix stay where they are.
            key_heads = kv_lens.size(1)
            query = query.reshape(batch * key_heads, self.num_heads // key_heads, *query.shape[2:])
            key = key.reshape(batch * key_heads, 1, *key.shape[2:])
            value = value.reshape(batch * key_heads, 1, *value.shape[2:])
            kv_lens = kv_lens.reshape(-1)
            if query_offsets is not None:
                query_offsets = query_offsets.repeat_interleave(key_heads)
        plan = self._made_plan()
        output: Tensor = torch.ops.fiak.csr_attention(
            query,
            key,
            value,
            self.crow_indices,
            self.col_indices,
            prior,
            plan=plan.plan,
            summary=plan.summary,
            query_offsets=query_offsets,
            kv_lens=kv_lens,
            dropout_p=dropout_p,
            seed=seed,
            scale=scale,
            score=score,
            log_prior=log_prior,
        )
        return output.reshape(batch, self.num_heads, queries, value.size(3)) if lens_of_heads else output

    # ---------------------------------------------------------------- Python protocols

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparsePattern):
            return NotImplemented
        return (
            self._sizes == other._sizes
            and self.shared_heads == other.shared_heads
            and self.nnz == other.nnz
            and bool((self.crow_indices == other.crow_indices.to(self.device)).all())
            and bool((self.col_indices == other.col_indices.to(self.device)).all())
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        groups, num_heads, num_queries, num_keys = self._sizes
        arguments = (self.crow_indices, self.col_indices, num_heads, num_queries, num_keys, groups)
        return SparsePattern, arguments

    def __repr__(self) -> str:
        return (
            f"SparsePattern(num_heads={self.num_heads}, num_queries={self.num_queries}, num_keys={self.num_keys}, "
            f"groups={self.groups}, {'shared_heads=True, ' if self.shared_heads else ''}nnz={self.nnz}, "
            f"density={self.density:.4f}, device={str(self.device)!r})"
        )

    # ---------------------------------------------------------------- helpers

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        return self.groups, self.num_heads, self.num_queries, self.num_keys

    @property
    def _num_rows(self) -> int:
        return self.crow_indices.numel() - 1

    @property
    def _pattern_heads(self) -> int:
        """Heads of a group that are stored: ``num_heads``, or 1 where all share a pattern."""
        return self.num_heads if self._num_rows == self.groups * self.num_heads * self.num_queries else 1

    def _of_heads(self, x: Tensor) -> Tensor:
        """``x [groups, heads, ...]`` of the stored heads, for all of them."""
        return x.expand(-1, self.num_heads, *x.shape[2:])

    def _of_each_head(self) -> tuple[SparsePattern, Tensor]:
        """A pattern that all heads share, stored for each, and the entry that each of its entries repeats."""
        counts = self.crow_indices.diff().view(self.groups, 1, self.num_queries).expand(-1, self.num_heads, -1)
        bounds = self.crow_indices[:: self.num_queries].tolist()
        ranges = [torch.arange(*bound, device=self.device).repeat(self.num_heads) for bound in pairwise(bounds)]
        entries = torch.cat(ranges)
        crow, col = _offsets(counts.flatten()), self.col_indices[entries]
        return self._like(crow, col, self.num_queries, self.num_keys), entries

    def _like(self, crow: Tensor, col: Tensor, num_queries: int, num_keys: int) -> SparsePattern:
        dtype = self.crow_indices.dtype
        return SparsePattern(crow.to(dtype), col.to(dtype), self.num_heads, num_queries, num_keys, self.groups)

    def _narrow(self) -> SparsePattern:
        """Makes the indices int32 where their values fit. Values that nobody has checked could wrap into the range."""
        if max(self.nnz, self.num_keys) < 2**31:
            with torch.inference_mode(False):
                self.crow_indices, self.col_indices = self.crow_indices.int(), self.col_indices.int()
        return self

    def _entry_rows(self) -> Tensor:
        """int64 ``[nnz]``: the row of each entry."""
        rows = torch.arange(self._num_rows, device=self.device)
        return rows.repeat_interleave(self.crow_indices.diff(), output_size=self.nnz)

    def _entry_heads(self) -> Tensor:
        """int64 ``[nnz]``: ``g * num_heads + h`` of each entry, or its group where all heads share a pattern."""
        return self._entry_rows() // max(self.num_queries, 1)

    def _used_columns(self) -> Tensor:
        """bool ``[groups * stored heads * num_keys]``: keys that some query of the head keeps."""
        used = torch.zeros(self.groups * self._pattern_heads * self.num_keys, dtype=torch.bool, device=self.device)
        used[self._entry_heads() * self.num_keys + self.col_indices] = True
        return used

    def _select(self, start: int, stop: int, num_keys: int) -> SparsePattern:
        """Queries start to stop - 1 of each head, keys 0 to num_keys - 1."""
        rows = self._entry_rows()
        query = rows % max(self.num_queries, 1)
        kept = (query >= start) & (query < stop) & (self.col_indices < num_keys)
        new_rows = rows[kept] // max(self.num_queries, 1) * (stop - start) + query[kept] - start
        counts = torch.bincount(new_rows, minlength=self.groups * self._pattern_heads * (stop - start))
        return self._like(_offsets(counts), self.col_indices[kept], stop - start, num_keys)


def _offsets(counts: Tensor) -> Tensor:
    """CSR row offsets from the number of entries in each row."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _outside_inference(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one made in inference mode, which autograd could not save."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def plan_num_queries(plan: Tensor) -> int:
    """The queries of each head of the pattern that a plan was made for."""
    header = plan[: _C.PLAN_HEADER_BYTES].cpu().numpy().tobytes()
    return int(_C.read_plan(header)["num_queries"])


def check_size(owner: str, name: str, size: object, least: int) -> None:
    """Raises ValueError unless ``size`` is an integer of at least ``least``."""
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt, np.integer)):
        raise ValueError(f"{owner}: {name} must be an integer (got {size!r})")
    if size < least:
        raise ValueError(f"{owner}: {name} must be at least {least} (got {size})")
