"""Released models loaded from files in their published layout at full size: nothing random, nothing left over."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import published_names
from PIL import Image
from published_files import write_published

from biomedclip.models.load import load
from biomedclip.models.zoo import read_model

TEXTS = ["a chest x-ray of the tumour", "a", "of the of the of the chest"]


def check(name: str, folder: Path) -> None:
    facts = read_model(name)
    write_published(facts, folder)
    several = len(facts.files_of("weights")) > 1
    paths = facts.files_of("weights")[0].paths
    given = folder if several else next(folder / Path(p).name for p in paths if (folder / Path(p).name).is_file())
    model, preprocess, tokenizer = load(name, checkpoint=given, local_files_only=True)
    report = model.load_report
    assert not report.missing
    assert not report.extra
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    picture = Image.linear_gradient("L").resize((300, 260)).convert("RGB")
    tokens = tokenizer(TEXTS)
    with torch.inference_mode():
        image = model.encode_image(preprocess(picture).unsqueeze(0), normalize=True)
        text = model.encode_text(tokens, normalize=True)
        first = model.encode_text(tokenizer(TEXTS[:1]), normalize=True)
    assert image.shape[-1] == text.shape[-1]
    assert torch.isfinite(image).all()
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first[0], text[0], rtol=1e-3, atol=1e-4)
    assert model.logit_scale.shape == ()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", published_names())
def test_every_model_loads_whole_from_its_published_files(name, tmp_path):
    try:
        check(name, tmp_path)
    finally:
        shutil.rmtree(tmp_path)
        gc.collect()
