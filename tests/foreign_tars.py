"""WebDataset tars as other people write them, for tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from synthetic_shards import encode


def picture(number: int, kind: str = "JPEG", side: int = 40) -> bytes:
    """A noise picture that depends on its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
    return encode(pixels, kind)


def members_of(key: str, number: int, *, suffix: str = "jpg", article: str | None = None) -> list[tuple[str, bytes]]:
    """Picture, caption and json of one sample."""
    kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix]
    record = json.dumps({"article": article} if article else {"n": number})
    return [(f"{key}.{suffix}", picture(number, kind)), (f"{key}.txt", f"Figure {number}: noise.".encode()),
            (f"{key}.json", record.encode())]  # fmt: skip


def write_tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar with these members; a TarInfo is taken as it is, so that links and folders can be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data) if data else None)
    return path


def write_foreign(folder: Path, *, tars: int = 3, samples: int = 8) -> list[Path]:
    """Tars written by webdataset's own writer, with articles of four samples in their json."""
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(tars):
        paths.append(folder / f"{shard:05d}.tar")
        with webdataset.TarWriter(str(paths[-1])) as writer:
            for place in range(samples):
                number = shard * samples + place
                names = members_of("x", number, suffix=("jpg", "png", "webp")[number % 3], article=f"A{number // 4}")
                writer.write({"__key__": f"s{number:04d}", **{name.partition(".")[2]: data for name, data in names}})
    return paths
