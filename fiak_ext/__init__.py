"""Transformers with learned attention priors (FiAK), pruned to static sparse attention that is fast.

Importing registers the operators ``torch.ops.fiak.*``.
"""

from fiak_ext._loading import load_library

load_library()

from fiak_ext import reference  # noqa: E402
from fiak_ext.compaction import compact  # noqa: E402
from fiak_ext.modules import MultiHeadSelfAttention, PriorAttention  # noqa: E402
from fiak_ext.pattern import SparsePattern  # noqa: E402

__all__ = [
    "MultiHeadSelfAttention",
    "PriorAttention",
    "SparsePattern",
    "compact",
    "reference",
]
