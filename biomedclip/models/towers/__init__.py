"""Towers of released models that open_clip cannot express, over the trunks of timm, transformers and open_clip.

A model file of the zoo names one of the builders here (`bert_pair`, `biovil`, `conch`, `musk`); each has
`build(config)`, reads no file and no network, and yields an open_clip `CustomTextCLIP` in all but its towers. What is
written here is only what no library has: poolings, heads and the multiway transformer.
"""
