"""BiomedCLIP at full size: random weights in the published layout, from a Hub, against open_clip from the same Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from hub_server import serve
from published_biomedclip import CONFIG_BYTES, make_repos

SCRIPT = """
import json, sys
import numpy as np, open_clip, torch
from PIL import Image
from biomedclip.models.build import assemble
from biomedclip.models.load import load, released_parts
from biomedclip.models.zoo import ReleasedModel

facts = ReleasedModel.model_validate_json(sys.argv[1])
model, preprocess, tokenizer = assemble(released_parts(facts))
repo = "hf-hub:" + facts.source.repo
theirs, their_preprocess = open_clip.create_model_from_pretrained(repo)
their_tokenizer = open_clip.get_tokenizer(repo)
picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (260, 310, 3), dtype=np.uint8))
texts = ["a chest x-ray of the tumour", "of the of the", "a"]
images, tokens = preprocess(picture)[None], tokenizer(texts)
with torch.inference_mode():
    image, text = model.encode_image(images), model.encode_text(tokens)
    their_image, their_text = theirs.eval().encode_image(images), theirs.encode_text(tokens)
report = model.load_report
print(json.dumps({
    "tensors": len(model.state_dict()), "dropped": list(report.dropped), "renamed": report.renamed,
    "pixels": bool(torch.equal(images, their_preprocess(picture)[None])),
    "ids": bool(torch.equal(tokens, their_tokenizer(texts))), "context": tokens.shape[1],
    "image": float((image - their_image).abs().max()), "text": float((text - their_text).abs().max()),
    "size": float(their_image.abs().max()),
}))
released_parts(facts, local_files_only=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_biomedclip_at_full_size_is_open_clip_s(tmp_path, monkeypatch):
    monkeypatch.setenv("BIOMEDCLIP_CACHE", str(tmp_path / "own"))
    try:
        repos, facts = make_repos(tmp_path / "files")
        # 4 kB off the published 783,705,670: pickled names of storages and the layout of the zip differ.
        assert facts.files[0].size == pytest.approx(783_705_670, rel=1e-4)
        with serve(repos) as server:
            env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
                   "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
            env.pop("HF_TOKEN", None)
            arguments = [sys.executable, "-c", SCRIPT, facts.model_dump_json()]
            done = subprocess.run(arguments, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.strip().splitlines()[-1])
        assert found["tensors"] == 351
        assert found["dropped"] == ["text.transformer.embeddings.position_ids"]
        assert found["pixels"]
        assert found["ids"]
        assert found["context"] == 256
        assert found["image"] == 0.0
        assert found["text"] <= 1e-6 * max(found["size"], 1)
    finally:
        for folder in ("files", "home"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)


def test_the_fixture_s_config_is_the_published_one():
    import hashlib

    published = "9a41f334a8c444678772c0ebb9ab854c97ab350bced3a17b803e258d39c23dc0"
    assert hashlib.sha256(CONFIG_BYTES).hexdigest() == published
    assert len(CONFIG_BYTES) == 707
