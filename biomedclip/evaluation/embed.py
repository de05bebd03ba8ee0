"""Images and sentences to unit embeddings, once: batched, checked, and kept on disk.

Reads a Manifest and a model of open_clip's kind; yields `ImageEmbeddings`: ids and (N, D) float32 vectors of length 1
for every image that could be read, and a Drop for every one that could not. A NaN is an error that names the samples,
because NaN compares false to everything and would silently rank best or worst. The cache key is made of the weights
themselves, the preprocessing, the manifest, the state of its files and the precision, not of the model's name: a
retrained `my-model` is another model. With a cache folder, finished parts are kept as they come (embedding_parts.py),
so an interrupted run goes on where it was; with several processes Lightning deals the rows out (predict.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from biomedclip.errors import CheckpointError, ConfigError, DataError
from biomedclip.evaluation.embedding_parts import PART_ROWS, Part, join_parts, read_parts, write_part
from biomedclip.evaluation.packed import packing
from biomedclip.files import sha256_json, write_atomic
from biomedclip.progress import Advance, Progress, silent
from biomedclip.schema import Drop, LabelledImage, Manifest

if TYPE_CHECKING:
    import torch
    from PIL import Image

ReadImage = Callable[[Manifest, LabelledImage], "Image.Image"]
Precision = Literal["float32", "bfloat16", "float16"]
"""What the towers compute in; embeddings are float32 of length 1 in any case."""
_CACHE_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEmbeddings:
    """Unit embeddings of the readable images of a manifest, in its order."""

    sample_ids: tuple[str, ...]
    vectors: NDArray[np.float32]
    drops: tuple[Drop, ...] = ()
    cached: bool = False


def fingerprint(model: torch.nn.Module) -> str:
    """`sha256:…` of every parameter and buffer, by name, type, shape and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # A view as bytes: numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def choose_device(wanted: str) -> str:
    """The device that `auto`, `cpu` or `cuda` stands for on this machine. Raises ConfigError for cuda without one."""
    import torch

    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ConfigError("device", "cuda is not available here", todo="--set device=cpu")
    return ("cuda" if has_cuda else "cpu") if wanted == "auto" else wanted


def describe_preprocess(preprocess: Callable[..., Any]) -> str:
    """repr without memory addresses, which open_clip's transforms carry and which differ in every process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(preprocess))


def embed_images(
    model: torch.nn.Module,
    preprocess: Callable[[Image.Image], torch.Tensor],
    manifest: Manifest,
    *,
    read: ReadImage | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
    precision: Precision = "float32",
    processes: int = 1,
    max_excluded: float = 0.01,
    cache: str | Path | None = None,
    model_hash: str | None = None,
    progress: Progress = silent,
) -> ImageEmbeddings:
    """Embeddings of all rows of the manifest, from the cache folder where it has them.

    `read` fetches a row's picture, by default `biomedclip.layouts.read_rgb`. `processes` above 1 share the rows, one
    GPU each where `device` is cuda; what they run (model, preprocess, read) must then be importable. Raises DataError
    where more than `max_excluded` of the images cannot be read, where none can unless that is 1, and where an embedding
    is not finite.
    """
    path = None
    if cache is not None:
        weights = model_hash or fingerprint(model)
        files = _file_states(manifest)
        key = [_CACHE_VERSION, weights, describe_preprocess(preprocess), manifest.sha256, files, precision]
        path = Path(cache) / f"{manifest.name}-{sha256_json(key)[:24]}.npz"
        found = _read_cache(path)
        if found is not None:
            return found
    rows = Rows(manifest, read or _read_row(), preprocess)
    with contextlib.ExitStack() as stack:
        folder = path.with_suffix(".parts") if path is not None else None
        parts = read_parts(folder) if folder is not None else []
        done = {int(row) for part in parts for row in part.rows}
        left = [row for row in range(len(rows)) if row not in done]
        with progress(f"embedding {manifest.name}", len(rows)) as advance:
            advance(len(done))
            if processes > 1 and left:
                from biomedclip.evaluation.predict import predict_rows

                shared = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
                predict_rows(model, rows, left, shared, batch_size=batch_size, workers=workers, device=device,
                             precision=precision, processes=processes)  # fmt: skip
                parts = read_parts(shared)
                advance(len(left))
            else:
                known = sum(len(part.drops) for part in parts)
                with packing(model, device, precision):
                    parts += _embed_here(model, rows, left, folder, batch_size, workers, device, precision,
                                         max_excluded, known, advance)  # fmt: skip
    result = _assemble(parts, manifest, max_excluded)
    if path is not None:
        _write_cache(path, result)
        shutil.rmtree(path.with_suffix(".parts"), ignore_errors=True)
    return result


def _embed_here(
    model: torch.nn.Module, rows: Rows, left: Sequence[int], folder: Path | None, batch_size: int, workers: int,
    device: str, precision: Precision, max_excluded: float, known_drops: int, advance: Advance,
) -> list[Part]:  # fmt: skip
    """The parts of the rows that are left, each also written where there is a folder."""
    parts: list[Part] = []
    waiting: list[Part] = []
    drops = known_drops
    for batch in _batches(rows, left, batch_size, workers):
        part = embed_batch(model, batch, device, precision)
        drops += len(part.drops)
        _check_excluded(drops, part.drops, rows.manifest, max_excluded)
        ids = [rows.manifest.rows[row].sample_id for row in part.embedded()]
        check_finite(part.vectors, ids, rows.manifest.name)
        waiting.append(part)
        if sum(len(p.rows) for p in waiting) >= PART_ROWS:
            parts.append(_flush(waiting, folder))
            waiting = []
        advance(len(part.rows))
    return [*parts, _flush(waiting, folder)] if waiting else parts


def _flush(waiting: Sequence[Part], folder: Path | None) -> Part:
    part = join_parts(waiting)
    if folder is not None:
        write_part(folder, part)
    return part


def _assemble(parts: Sequence[Part], manifest: Manifest, max_excluded: float) -> ImageEmbeddings:
    """The embeddings in the manifest's order. Raises DataError for what must not be, whoever made the parts."""
    whole = join_parts(parts) if parts else Part(np.zeros(0, dtype=np.int64), np.zeros((0, 0), np.float32), ())
    if len(whole.rows) != len(manifest.rows) or len(np.unique(whole.rows)) != len(whole.rows):
        raise DataError(manifest.name, "was not embedded once each", found=f"{len(whole.rows)} of {len(manifest.rows)}",
                        todo="delete the .parts folder of the cache and run it again")  # fmt: skip
    _check_excluded(len(whole.drops), whole.drops, manifest, max_excluded)
    embedded = whole.embedded()
    if not len(embedded) and max_excluded < 1:
        raise DataError(manifest.name, "has no readable image", found=f"{len(whole.drops)} unreadable",
                        todo="check the root")  # fmt: skip
    order = np.argsort(embedded, kind="stable")
    ids = tuple(manifest.rows[row].sample_id for row in embedded[order])
    vectors = whole.vectors[order]
    check_finite(vectors, ids, manifest.name)
    place = {row.sample_id: number for number, row in enumerate(manifest.rows)}
    drops = tuple(sorted(whole.drops, key=lambda drop: place[drop.item]))
    return ImageEmbeddings(sample_ids=ids, vectors=vectors, drops=drops)


def embed_texts(
    model: torch.nn.Module,
    tokenizer: Callable[[list[str]], torch.Tensor],
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    device: str = "cpu",
    progress: Progress = silent,
) -> NDArray[np.float32]:
    """(M, D) unit embeddings of the texts. Raises DataError naming the texts whose embedding is not finite."""
    import torch

    parts = []
    with progress("embedding texts", len(texts)) as advance:
        for start in range(0, len(texts), batch_size):
            chunk = list(texts[start : start + batch_size])
            with torch.inference_mode(), _evaluating(model):
                vectors = model.encode_text(tokenizer(chunk).to(device), normalize=True)  # type: ignore[operator]
            parts.append(_unit(vectors))
            check_finite(parts[-1], [repr(text)[:60] for text in chunk], "texts")
            advance(len(chunk))
    return np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.float32)


def logit_scale_of(model: torch.nn.Module) -> float:
    """The model's logit scale, exponentiated. Raises CheckpointError where it has none or it is not finite."""
    scale = getattr(model, "logit_scale", None)
    if scale is None:
        raise CheckpointError(type(model).__name__, "has no logit_scale", todo="load it with biomedclip.load")
    value = float(scale.detach().exp())
    if not np.isfinite(value):
        raise CheckpointError(type(model).__name__, "has a logit_scale that is not finite", found=value)
    return value


def _read_row() -> ReadImage:
    from biomedclip.layouts import read_rgb

    return read_rgb


class Rows:
    """Row number to (row number, tensor or Drop), for torch's DataLoader."""

    def __init__(self, manifest: Manifest, read: ReadImage, preprocess: Callable[[Any], Any]) -> None:
        self.manifest, self.read, self.preprocess = manifest, read, preprocess

    def __len__(self) -> int:
        return len(self.manifest.rows)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        row = self.manifest.rows[index]
        try:
            return index, self.preprocess(self.read(self.manifest, row))
        except (DataError, OSError) as error:
            return index, Drop(
                source=self.manifest.name, item=row.sample_id, reason="unreadable_image", detail=str(error)[:200]
            )


def _batches(rows: Rows, left: Sequence[int], batch_size: int, workers: int) -> Iterator[list[tuple[int, Any]]]:
    if workers == 0:
        for start in range(0, len(left), batch_size):
            yield [rows[i] for i in left[start : start + batch_size]]
        return
    from torch.utils.data import DataLoader, Subset

    yield from DataLoader(Subset(rows, left), batch_size=batch_size, num_workers=workers, collate_fn=list)  # type: ignore[arg-type]


def embed_batch(
    model: torch.nn.Module, batch: Sequence[tuple[int, Any]], device: str, precision: Precision = "float32"
) -> Part:
    """One batch of (row number, tensor or Drop) as a Part; whether vectors are finite is the caller's to check."""
    good = [(row, image) for row, image in batch if not isinstance(image, Drop)]
    drops = tuple(image for _, image in batch if isinstance(image, Drop))
    numbers = [row for row, _ in good] + [row for row, image in batch if isinstance(image, Drop)]
    vectors = np.zeros((0, 0), dtype=np.float32)
    if good:
        with _computing_in(precision, device):
            vectors = _encode_images(model, [image for _, image in good], device)
    return Part(np.asarray(numbers, dtype=np.int64), vectors, drops)


def _encode_images(model: torch.nn.Module, images: list[Any], device: str) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode(), _evaluating(model):
        batch = torch.stack(images).to(device)
        return _unit(model.encode_image(batch, normalize=True))  # type: ignore[operator]


def _computing_in(precision: Precision, device: str) -> contextlib.AbstractContextManager[Any]:
    import torch

    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, precision))


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout and batch norm as in use, and afterwards as they were: callers may be in the middle of training."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _unit(vectors: torch.Tensor) -> NDArray[np.float32]:
    """Length 1 in float32: half precision leaves lengths off by 1e-3, which reorders close scores."""
    wide = vectors.float()
    return (wide / wide.norm(dim=-1, keepdim=True)).cpu().numpy()


def check_finite(vectors: NDArray[np.float32], names: Sequence[str], where: str) -> None:
    """Raise DataError naming the samples whose embedding is not finite."""
    bad = [names[i] for i in np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist()]
    if bad:
        raise DataError(
            where, f"{len(bad)} embedding(s) of a batch are not finite", found=", ".join(bad[:5]),
            todo="check the weights and the precision of the model",
        )  # fmt: skip


def _check_excluded(count: int, drops: Sequence[Drop], manifest: Manifest, max_excluded: float) -> None:
    if count > max_excluded * len(manifest.rows) and drops:
        raise DataError(
            manifest.name, f"{count} of {len(manifest.rows)} images cannot be read, more than {max_excluded:.2%}",
            found=f"{drops[0].item}: {drops[0].detail}", todo="repair them or raise max_excluded",
        )  # fmt: skip


def _file_states(manifest: Manifest) -> list[tuple[str, int, int]]:
    """(path, bytes, time of change) of the files the rows point into: the manifest's hash is of rows, not of pixels."""
    states = []
    for relative in sorted({row.image.path for row in manifest.rows}):
        with contextlib.suppress(OSError):
            stat = (Path(manifest.root) / relative).stat()
            states.append((relative, stat.st_size, stat.st_mtime_ns))
    return states


def _write_cache(path: Path, result: ImageEmbeddings) -> None:
    with write_atomic(path) as file:
        np.savez(
            file, sample_ids=np.asarray(result.sample_ids, dtype=np.str_), vectors=result.vectors,
            drops=np.asarray([json.dumps(asdict(drop)) for drop in result.drops], dtype=np.str_),
        )  # fmt: skip


def _read_cache(path: Path) -> ImageEmbeddings | None:
    """The cached embeddings; None where there are none, or a foreign file stands in their place."""
    if not path.exists():
        return None
    try:
        # Opened here, because np.load leaves a file of its own open where the zip is broken.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            drops = tuple(Drop(**json.loads(text)) for text in file["drops"].tolist())
            ids = tuple(file["sample_ids"].tolist())
            return ImageEmbeddings(sample_ids=ids, vectors=file["vectors"], drops=drops, cached=True)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
