"""Hugging Face transformers: a file for each of its models, named as its folder in ``transformers.models``.

A file is imported when a model with classes of that folder is converted, so that what a release of transformers renames
in one model breaks no other.
"""
