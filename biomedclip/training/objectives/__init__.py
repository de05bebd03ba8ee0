"""Contrastive objectives as functions of embeddings: exact, in tiles, over one process or many.

`softmax` holds CLIP and InfoLOOB, `sigmoid` SigLIP, `hopfield` CLOOB, `long_captions` Long-CLIP, `pairs` what is known
about the pairs of a batch (label overlap, pairs that are no true negatives), `objective` the one that a config names.
"""
