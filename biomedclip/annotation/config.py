"""What embedding and clustering may be told. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from biomedclip.config import Config


class EmbedConfig(Config):
    """How the pictures of a dataset are embedded."""

    model: str
    """A run folder, a checkpoint folder or an open_clip name: whatever `biomedclip.load` takes."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read images; 0 reads in the main process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float16", "float32"] = "float16"
    """Of the stored vectors; half precision moves a cosine by 1e-3 at most, which no cluster depends on."""
    part_size: Annotated[int, Field(ge=1)] = 2048
    """Pictures between two points that an interrupted run goes on from."""
    max_excluded: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Largest share of unreadable pictures before the run is refused."""


class ClusterConfig(Config):
    """How embeddings are grouped, and what experts get to see."""

    clusters: Annotated[int, Field(ge=2)] | None = None
    """None takes the square root of the number of pictures, 2000 at most."""
    pca_dims: Annotated[int, Field(ge=1)] = 25
    method: Literal["auto", "kmeans", "minibatch"] = "auto"
    """`auto` takes k-means of ten starts below 20,000 pictures and mini-batches above."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    examples: Annotated[int, Field(ge=1, le=64)] = 8
    """Keys of the nearest samples in the table."""
    terms: Annotated[int, Field(ge=0, le=64)] = 8
    images: Annotated[int, Field(ge=1, le=64)] = 16
    """Pictures of each cluster on the contact sheet."""
    clusters_per_page: Annotated[int, Field(ge=1)] = 50
