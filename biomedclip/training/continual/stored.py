"""A teacher's embeddings kept beside the shards, so that learning from it costs a look-up and no forward pass.

`store_embeddings` reads the sources of a train config exactly as training will (the same crops and captions, which a
seed, a source, a sample and a view number decide) and writes, for each shard, `SHARD.teacher-NAME.parquet`: one row a
sample and view with the unit embeddings of image and caption in half precision. `StoredEmbeddings` finds the rows of a
batch by key. MobileCLIP (Vasu et al. 2024, arXiv 2311.17049) stores the parameters of each augmentation instead; here
a view number stands for them. The table is held in memory: samples x views x 4 bytes x D.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from biomedclip.errors import CheckpointError, ConfigError, DataError
from biomedclip.evaluation.embed import fingerprint
from biomedclip.files import sha256_json, write_atomic
from biomedclip.progress import Progress, silent
from biomedclip.stream.addresses import is_remote
from biomedclip.stream.decode import Geometry
from biomedclip.stream.plan import Pick
from biomedclip.stream.samples import Samples
from biomedclip.training.config import TrainConfig
from biomedclip.training.data import stream_sources

_METADATA = b"biomedclip_teacher"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFacts:
    """What a file of stored embeddings was made with; training must read its samples the same way."""

    teacher: str
    fingerprint: str
    logit_scale: float
    views: int
    seed: int
    source: str
    augmentation: str
    split: str


def teach(
    config: TrainConfig, teacher: str, *, name: str, views: int, folder: str | Path | None = None,
    progress: Progress = silent,
) -> list[Path]:  # fmt: skip
    """Store what `teacher` makes of the samples of a train config; returns the files.

    Raises CheckpointError for a teacher that cannot be loaded or takes images that are not square, and what
    `store_embeddings` raises.
    """
    from biomedclip.evaluation.embed import choose_device
    from biomedclip.models.load import load
    from biomedclip.stream.text import fast_tokenise

    model, _, tokenizer = load(teacher)
    visual: Any = model.visual
    facts = visual.preprocess_cfg
    sizes = {facts["size"]} if isinstance(facts["size"], int) else set(facts["size"])
    if len(sizes) != 1:
        raise CheckpointError(teacher, "does not take square images", found=facts["size"])
    geometry = Geometry(size_px=sizes.pop(), resize_mode=facts["resize_mode"], interpolation=facts["interpolation"])
    samples = Samples(
        stream_sources(config.data), batch_size=1, seed=config.seed, geometry=geometry,
        tokenise=fast_tokenise(tokenizer), fetch=config.data.fetch,
    )  # fmt: skip
    device = choose_device("auto" if config.device != "cpu" else "cpu")
    return store_embeddings(samples, model, name=name, teacher_name=teacher, views=views, folder=folder,
                            device=device, progress=progress)  # fmt: skip


def store_embeddings(
    samples: Samples, teacher: nn.Module, *, name: str, teacher_name: str, views: int, folder: str | Path | None = None,
    batch_size: int = 64, device: str = "cpu", progress: Progress = silent,
) -> list[Path]:  # fmt: skip
    """Write the sidecars of all samples of a mixture, a shard at a time; returns their paths.

    `samples` reads at the teacher's image size and with the teacher's tokenizer. A sidecar that is there and was made
    in the same way is kept, so an interrupted call goes on. Raises DataError for a sample that cannot be read, and
    ConfigError where a source lies at a URL and no `folder` is named.
    """
    model: Any = teacher.to(device).eval()
    known = fingerprint(model)
    paths = []
    shards = _by_shard(samples)
    with progress(f"embedding with {name}", sum(map(len, shards.values()))) as advance:
        for (number, shard), rows in shards.items():
            source = samples.rows[number].source
            facts = StoredFacts(
                teacher=teacher_name, fingerprint=known, logit_scale=float(model.logit_scale.detach().exp()),
                views=views, seed=samples.seed, source=source.name, augmentation=_name_augmentation(source),
                split=source.split,
            )  # fmt: skip
            path = sidecar_path(source, shard, name, folder)
            if not (path.exists() and _read_facts(path) == facts):
                picks = [Pick(part, row, view) for part, row in rows for view in range(views)]
                _write(path, facts, _embed(samples, picks, model, batch_size, device))
            paths.append(path)
            advance(len(rows))
    samples.close()
    return paths


class StoredEmbeddings:
    """Embeddings by sample, of one teacher or several, for the sources of a run."""

    def __init__(self, samples: Samples, names: Sequence[str], folder: str | Path | None = None) -> None:
        self.views: dict[str, int] = {}
        """Source -> views stored of each sample."""
        self._tables = [self._load(samples, name, folder) for name in names]

    def find(self, batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor, float]]:
        """(image (b, D), text (b, D), scale) of each teacher for a batch. Raises DataError for a sample without."""
        wanted = list(zip(batch["source"], batch["key"], batch["epoch"].tolist(), strict=True))
        found = []
        for table in self._tables:
            try:
                places = [table.rows[source, key, epoch % self.views[source]] for source, key, epoch in wanted]
            except KeyError as error:
                raise DataError(f"teacher {table.name}", "has no embedding of a sample", found=error.args[0],
                                todo="run: biomedclip teach again") from None  # fmt: skip
            image, text = (torch.from_numpy(x[places]).float() for x in (table.image, table.text))
            # Half precision leaves lengths off by 1e-3.
            found.append((nn.functional.normalize(image, dim=1), nn.functional.normalize(text, dim=1), table.scale))
        return found

    def _load(self, samples: Samples, name: str, folder: str | Path | None) -> _Table:
        import pyarrow.parquet as pq

        parts: list[tuple[np.ndarray, ...]] = []
        rows: dict[tuple[str, str, int], int] = {}
        scales: set[float] = set()
        for number, shard in _by_shard(samples):
            source = samples.rows[number].source
            path = sidecar_path(source, shard, name, folder)
            if not path.exists():
                raise DataError(path, "is missing", todo=f"run: biomedclip teach CONFIG --name {name}")
            facts = _read_facts(path)
            _check(path, facts, samples, source)
            if self.views.setdefault(source.name, facts.views) != facts.views:
                raise DataError(path, "holds another number of views than its neighbours", found=facts.views)
            table = pq.read_table(path)
            start = len(rows)
            keys, views = table["key"].to_pylist(), table["view"].to_pylist()
            rows |= {(source.name, key, view): start + i for i, (key, view) in enumerate(zip(keys, views, strict=True))}
            parts.append(tuple(_matrix(table[column]) for column in ("image", "text")))
            scales.add(facts.logit_scale)
        if len(scales) != 1:
            raise DataError(f"teacher {name}", "was not the same for all sources", found=sorted(scales))
        image, text = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return _Table(name, rows, image, text, scales.pop())


@dataclass(frozen=True, slots=True)
class _Table:
    name: str
    rows: dict[tuple[str, str, int], int]
    image: np.ndarray
    text: np.ndarray
    scale: float


def sidecar_path(source: Any, shard: str, name: str, folder: str | Path | None) -> Path:
    """Where the embeddings of a shard's samples lie. Raises ConfigError for a remote source without a folder."""
    stem = f"{Path(shard).name.removesuffix('.tar')}.teacher-{name}.parquet"
    if folder is not None:
        return Path(folder) / source.name / stem
    if is_remote(source.path) or not source.path or str(source.path).endswith(".tar"):
        raise ConfigError(f"data.sources: {source.name}", "is no dataset folder on this machine",
                          todo="name a folder for the teacher's embeddings")  # fmt: skip
    return Path(source.path) / stem


def _name_augmentation(source: Any) -> str:
    """A preset's name, or a hash of the settings that a config wrote out."""
    chosen = source.augmentation
    return chosen if isinstance(chosen, str) else sha256_json(chosen.model_dump(mode="json"))[:16]


def _by_shard(samples: Samples) -> dict[tuple[int, str], list[tuple[int, int]]]:
    """(first plan source of its source, shard) -> places of its samples; a balanced source is several to the plan."""
    first: dict[str, int] = {}
    shards: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for part, rows in enumerate(samples.rows):
        number = first.setdefault(rows.source.name, part)
        for row, shard in enumerate(rows.columns["shard"]):
            shards.setdefault((number, shard), []).append((part, row))
    return shards


def _embed(
    samples: Samples, picks: Sequence[Pick], model: Any, batch_size: int, device: str
) -> Iterator[tuple[list[str], list[int], np.ndarray, np.ndarray]]:
    facts = model.visual.preprocess_cfg
    mean, std = (255 * torch.tensor(facts[key], device=device).view(-1, 1, 1) for key in ("mean", "std"))
    for start in range(0, len(picks), batch_size):
        chosen = picks[start : start + batch_size]
        samples.prepare(chosen)
        images, captions = zip(*(samples.read(pick) for pick in chosen), strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
        with torch.inference_mode():
            image = model.encode_image((pixels - mean) / std, normalize=True)
            text = model.encode_text(samples.tokenise(captions).to(device), normalize=True)
        keys = [samples.rows[pick.source].columns["key"][pick.row] for pick in chosen]
        yield keys, [pick.epoch for pick in chosen], *(x.half().cpu().numpy() for x in (image, text))


def _write(
    path: Path, facts: StoredFacts, batches: Iterator[tuple[list[str], list[int], np.ndarray, np.ndarray]]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    with write_atomic(path) as file:
        for keys, views, image, text in batches:
            vectors = {
                name: pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
                for name, x in (("image", image), ("text", text))
            }
            table = pa.table({"key": keys, "view": pa.array(views, pa.int16()), **vectors})
            if writer is None:
                schema = table.schema.with_metadata({_METADATA: json.dumps(asdict(facts)).encode()})
                writer = pq.ParquetWriter(file, schema, compression="zstd")
            writer.write_table(table.cast(schema))
        if writer is not None:
            writer.close()


def _read_facts(path: Path) -> StoredFacts:
    import pyarrow.parquet as pq

    try:
        return StoredFacts(**json.loads((pq.read_schema(path).metadata or {})[_METADATA]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(path, "holds no embeddings of a teacher", found=repr(error)[:80], todo="delete it") from None


def _check(path: Path, facts: StoredFacts, samples: Samples, source: Any) -> None:
    wanted = {"seed": samples.seed, "source": source.name, "augmentation": _name_augmentation(source)}
    for key, ours in wanted.items():
        if getattr(facts, key) != ours:
            raise DataError(path, f"was written for another {key}", found=f"{getattr(facts, key)!r}, here {ours!r}",
                            todo="run: biomedclip teach with this config")  # fmt: skip


def _matrix(column: Any) -> np.ndarray:
    lists = column.combine_chunks()
    width = lists.type.list_size
    return np.asarray(lists.flatten().to_numpy(zero_copy_only=False), dtype=np.float16).reshape(-1, width)
