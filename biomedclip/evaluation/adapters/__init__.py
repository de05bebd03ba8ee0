"""Adapters: a frozen model and some labelled images to a better classifier, all on cached embeddings.

Each module opens with its method and source. All have one shape: `fit_…(support, selection, text=…, logit_scale=…)`
yields an `Adapted` (features.py), whose `logits` map embeddings (N, D) to (N, C), and whose `choice` says which
hyper-parameters were chosen, by what and on which split.
"""
