"""What the stream benchmarks read: figures of about 600 x 450 px at JPEG quality 90 with real captions, in our shards.

Real pixels and real words: windows are cut out of the figures of the bundled articles, as the PMC builder extracts
them, and each keeps a caption of those articles. Four or five figures follow each other as one made-up article, in the
order in which builders write. The tars are read by every trainer in place. A BERT WordPiece vocabulary is learnt from
the same captions, because the published ones cannot be bundled.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from biomedclip.config import config_file, load_config
from biomedclip.schema import Pair
from biomedclip.shards import DatasetFolder, DatasetWriter
from data_builders.build import BuildConfig, build

SIZE_PX = (600, 450)


def write_figures(root: Path, count: int, per_shard: int) -> DatasetFolder:
    """A dataset folder of `count` figures below `root`, `per_shard` in each tar; made once."""
    root.mkdir(exist_ok=True)
    folder = root / "figures"
    if not (folder / "manifest.json").exists():
        images, captions = read_sample(root)
        random = np.random.default_rng(0)
        with DatasetWriter(folder, name="figures", max_samples=per_shard) as writer:
            article, left = -1, 0
            for number in range(count):
                if not left:
                    article, left = article + 1, int(random.integers(4, 6))
                left -= 1
                writer.add(make_pair(number, article, images, captions, random))
            writer.finish(provenance={}, card=lambda manifest: "# figures for a benchmark\n")
    return DatasetFolder(folder)


def read_sample(root: Path) -> tuple[list[Image.Image], list[str]]:
    """The larger pictures of the bundled articles, and all captions of theirs."""
    folder = root / "pmc"
    if not (folder / "manifest.json").exists():
        build(load_config(config_file("build/demo_pmc.yaml"), BuildConfig), folder)
    samples = list(DatasetFolder(folder).samples())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow on transparent palettes
        pictures = [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in samples]
    large = [picture for picture in pictures if min(picture.size) >= 300]
    return large, [sample.caption for sample in samples]


def make_pair(
    number: int, article: int, images: list[Image.Image], captions: list[str], random: np.random.Generator
) -> Pair:
    """One figure: a window of a real one, scaled to about 600 x 450 px, and a caption made different by its number."""
    picture = images[int(random.integers(len(images)))]
    share = random.uniform(0.6, 1.0)
    width, height = (int(side * share) for side in picture.size)
    left, top = int(random.integers(picture.width - width + 1)), int(random.integers(picture.height - height + 1))
    size = tuple(int(side * random.uniform(0.9, 1.1)) for side in SIZE_PX)
    view = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    buffer = io.BytesIO()
    view.save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()
    return Pair(
        key=f"pmc{article:06d}-{number:06d}", image=data, image_format="jpg", width=size[0], height=size[1],
        caption=f"{captions[int(random.integers(len(captions)))]} ({number})", source="figures", licence="CC BY",
        sha256=hashlib.sha256(data).hexdigest(), phash=0, article_id=f"PMC{article}.1", figure_id=str(number),
    )  # fmt: skip


def write_wordpiece(root: Path, captions: list[str]) -> Path:
    """A folder that transformers reads as a BERT tokenizer, its vocabulary learnt from the captions."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    folder = root / "wordpiece"
    if not (folder / "tokenizer.json").exists():
        learnt = BertWordPieceTokenizer(lowercase=True)
        learnt.train_from_iterator(captions, vocab_size=30_522, show_progress=False)
        learnt.save_model(str(root))
        # The file by its keyword: the first positional argument of transformers 5 is the vocabulary itself.
        tokenizer = BertTokenizerFast(vocab=str(root / "vocab.txt"), do_lower_case=True, model_max_length=256)
        tokenizer.save_pretrained(folder)
    return folder
