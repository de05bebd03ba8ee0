"""Pictures labelled by the cluster: a model embeds them, k-means groups them, experts name the groups.

`embeddings.py` embeds a dataset folder, `clusters.py` groups the embeddings and writes a table for experts to fill with
contact sheets beside it (`sheets.py`), `labels.py` reads the filled tables and writes what they say of every sample to
`annotations.parquet`, which `DatasetFolder.index` joins. An expert looks at sixteen pictures instead of ten thousand;
what that misses is told by the distance of each sample from the middle of its cluster.
"""
