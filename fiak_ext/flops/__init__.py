"""Exact operation counts of attention, dense and pruned: Table 1, whole models, every op; and attention's memory.

Two conventions are in use, and never mixed. Both leave out softmax, scale, normalisation, biases and activations.

``table1``
    Multiplications plus additions, where the first term of a sum costs no addition: ``2n - 1`` for a sum of ``n``
    products (Table 1 and Appendix D of the paper).
``torch``
    2 for every multiply-add (``torch.utils.flop_counter``).

A :class:`Work` gives both. Importing this package registers formulas with ``torch.utils.flop_counter``, so that
``FlopCounterMode`` gives the executed count, in the ``torch`` convention, of every op of ``torch.ops.fiak``, and of
torch's fused CPU attention what torch itself counts from 2.15 on. In multiply-adds, for each batch element and query
head:

* ``prior_attention``: ``D + Dv`` for each pair that neither ``is_causal`` nor ``kv_lens`` hides, whatever its weight.
* ``csr_attention``: ``D + Dv`` for each entry of the pattern that ``kv_lens`` does not hide.
* Their backwards compute the scores again instead of storing them, in two passes. By rows, where the gradient of query
  or prior is wanted: scores, dA and dQ, ``2D + Dv`` for each pair. By columns, where that of key or value is wanted:
  scores, dA, dV and dK, ``2D + 2Dv``. If ``D = Dv``, that makes 7 products of one size; the forward pass has 2, and
  a backward that kept all scores would have 4.
* ``compact_linear``: ``D * Dx`` for each kept row; its backward as much for each of input's and weight's gradient.
* ``compact_kv`` and ``csr_plan``: 0.

Executed means the algorithm, as the scalar kernels run it; what vector kernels add by rounding sizes up to whole
vectors and tiles is not counted. What belongs to a row or a key and not to a pair (delta in backward, ``|k_j|^2`` of
the Gaussian score) is normalisation. ``kv_lens``, ``query_offsets`` and ``keep`` are read where they hold data; tensors
without (fake, meta) count as hiding nothing.
"""

from __future__ import annotations

from fiak_ext.flops.memory import attention_memory, model_memory, peak_memory
from fiak_ext.flops.model import model_report, pair_flops
from fiak_ext.flops.paper import attention_cost, table1
from fiak_ext.flops.report import Comparison, LayerFlops, ModelFlops
from fiak_ext.flops.work import Work

__all__ = [
    "Comparison",
    "LayerFlops",
    "ModelFlops",
    "Work",
    "attention_cost",
    "attention_memory",
    "model_memory",
    "model_report",
    "pair_flops",
    "peak_memory",
    "table1",
]
