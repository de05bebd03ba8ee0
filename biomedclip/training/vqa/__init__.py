"""Heads that learn to answer questions about images, on any encoder of `biomedclip.load`.

config.py says what a run may be told, heads.py holds the three heads, module.py the LightningModule, train.py runs
every encoder with every seed and writes one table; scoring is `biomedclip.evaluation.vqa`'s.
"""
