"""Priors in the models of other libraries: a file for each library, or for each model of transformers.

A file is imported when a model with its classes is converted. It holds, for each attention class, a subclass of it and
of :class:`~fiak_ext.conversion.ConvertedAttention` that is registered with
:func:`~fiak_ext.conversion.register_attention`. A subclass says what its :class:`~fiak_ext.PriorAttention` is made
with, and has a forward pass that calls it.
"""
