"""BiomedCLIP at its full published size, 352 tensors of random numbers, as the repositories a Hub serves."""

from __future__ import annotations

import json
from pathlib import Path

from hub_server import Repo
from published_files import write_published

from biomedclip.models.hub import file_hash
from biomedclip.models.zoo import ReleasedModel, read_model

REPO = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
COMPANION = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
CONFIG = {
    "model_cfg": {
        "embed_dim": 512,
        "vision_cfg": {"timm_model_name": "vit_base_patch16_224", "timm_model_pretrained": False, "timm_pool": "",
                       "timm_proj": "linear", "image_size": 224},
        "text_cfg": {"hf_model_name": COMPANION, "hf_tokenizer_name": COMPANION, "hf_proj_type": "mlp",
                     "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 256},
    },
    "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
}  # fmt: skip
CONFIG_BYTES = json.dumps(CONFIG, indent=2).encode()
"""Byte for byte the published file: its sha256 is the pinned one."""


def make_repos(folder: Path) -> tuple[dict[str, Repo], ReleasedModel]:
    """The repositories with a random checkpoint of full size, and the zoo's facts pinned to that file's bytes."""
    facts = read_model("biomedclip")
    write_published(facts, folder)
    weights = folder / "open_clip_pytorch_model.bin"
    pinned = {"size": weights.stat().st_size, "sha256": file_hash(weights)}
    files = tuple(file.model_copy(update=pinned) if file.role == "weights" else file for file in facts.files)
    tokenizer = json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}).encode()
    text = json.dumps(facts.architecture.text_config).encode()
    repos = {
        REPO: Repo(
            {"open_clip_pytorch_model.bin": weights, "open_clip_config.json": CONFIG_BYTES,
             "vocab.txt": folder / "vocab.txt", "tokenizer_config.json": tokenizer},
            commit=facts.source.revision or "", lfs={"open_clip_pytorch_model.bin"},
        ),
        COMPANION: Repo({"config.json": text, "vocab.txt": folder / "vocab.txt", "tokenizer_config.json": tokenizer}),
    }  # fmt: skip
    return repos, facts.model_copy(update={"files": files})
