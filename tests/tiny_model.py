"""A CLIP of a few thousand weights, as a folder in open_clip's format: what tests train and load."""

from pathlib import Path

import open_clip
import torch
from synthetic_shards import write_articles, write_colours

from biomedclip.models.export import export_open_clip

MODEL_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """The folder of a tiny model with random weights."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**MODEL_CFG)
    model.visual.preprocess_cfg = {
        "size": (32, 32), "mode": "RGB", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
    }  # fmt: skip
    return export_open_clip(model, folder, model_cfg=MODEL_CFG)


def write_training_folders(root: Path, *others: str) -> Path:
    """`root` with what a short run reads: colours/, articles/, model/, and further models by name, of other weights."""
    write_colours(root / "colours")
    write_articles(root / "articles")
    for seed, name in enumerate(("model", *others)):
        write_tiny_model(root / name, seed=seed)
    return root
