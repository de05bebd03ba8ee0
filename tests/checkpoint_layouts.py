"""The tensors of every released checkpoint, from hand-written lists that know nothing of our key rules.

`data/layouts/NAME.txt` lists the files of the model NAME as they were published: `[path in the repository]`, then one
line for each kind of tensor, `key shape [dtype] [arange]`. `{0..11}` and `{weight,bias}` stand for several keys;
`use PART PREFIX name=value …` puts the lines of `parts/PART.txt` under a prefix, with `<name>` and `<4name>` (four
times) replaced; `like NAME` takes over another model's tensors. `wrapper state_dict` says that the tensors lie under
that entry of a pickled dict, `prefix module.` that every key begins so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from biomedclip.models.catalog import list_names, plain_facts

FOLDER = Path(__file__).parent / "data" / "layouts"


@dataclass
class LayoutFile:
    """One published file."""

    path: str
    wrapper: str | None = None
    keys: dict[str, tuple[tuple[int, ...], torch.dtype, bool]] = field(default_factory=dict)
    """Shape, dtype, and whether the values are 0, 1, 2, …"""

    def tensors(self, device: str = "cpu", seed: int = 0) -> dict[str, torch.Tensor]:
        """The file's tensors with small random numbers (variances positive), or on the meta device."""
        # One pool of numbers, read from another place for each tensor: drawing a billion of them takes minutes.
        pool = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed)) * 0.05
        made = {}
        for index, (key, (shape, dtype, arange)) in enumerate(self.keys.items()):
            count = math.prod(shape)
            if device == "meta":
                made[key] = torch.empty(shape, dtype=dtype, device="meta")
            elif arange:
                made[key] = torch.arange(count, dtype=dtype).reshape(shape)
            elif not dtype.is_floating_point:
                made[key] = torch.ones(shape, dtype=dtype)
            else:
                turned = pool.roll(-7919 * index)
                made[key] = turned.repeat(-(-count // len(pool)))[:count].reshape(shape).clone()
                if key.endswith("running_var") or (key.endswith("weight") and len(shape) == 1):
                    made[key] = made[key].abs() + 0.5
        return made


def safetensors_size(file: LayoutFile) -> int:
    """Bytes of the file in safetensors' format: header length, header padded to 8, then wide dtypes first."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, (shape, dtype, _) in sorted(file.keys.items(), key=lambda entry: (-entry[1][1].itemsize, entry[0])):
        end = position + math.prod(shape) * dtype.itemsize
        name = {torch.float32: "F32", torch.int64: "I64"}[dtype]
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + position


def published_names() -> list[str]:
    """Names of the zoo's models that others published; what comes with the package is its own layout."""
    return [name for name in list_names() if plain_facts(name)["source"]["kind"] != "bundled"]


def layout_names() -> list[str]:
    """Names of all models that have a layout."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


@cache
def read_layout(name: str) -> list[LayoutFile]:
    """The published files of a model."""
    files: list[LayoutFile] = []
    prefix = ""
    for line in _lines(FOLDER / f"{name}.txt"):
        word, _, rest = line.partition(" ")
        if line.startswith("["):
            files.append(LayoutFile(line.strip("[]")))
            prefix = ""
        elif word == "wrapper":
            files[-1].wrapper = rest
        elif word == "prefix":
            prefix = rest
        elif word == "like":
            _add(files[-1], {prefix + key: facts for key, facts in read_layout(rest)[0].keys.items()})
        else:
            _add(files[-1], dict(_tensors(line, prefix, {})))
    return files


def shrunk(
    name: str, *, layers: int, of: dict[int, int], special: dict[str, tuple[int, ...]] | None = None
) -> dict[str, torch.Tensor]:
    """A one-file layout's tensors at other sizes: `of` gives new sizes for published ones, blocks from `layers` on go.

    Numbers are random and large enough that every tensor shows in an output.
    """
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for key, (shape, dtype, arange) in read_layout(name)[0].keys.items():
        if next((int(part) for part in key.split(".") if part.isdigit()), 0) >= layers:
            continue
        size = tuple(of.get(number, number) for number in (special or {}).get(key, shape))
        if arange:
            tensors[key] = torch.arange(math.prod(size), dtype=dtype).reshape(size)
            continue
        noise = torch.randn(size, generator=generator)
        if len(size) == 1 and key.endswith("weight"):
            tensors[key] = 1 + 0.2 * noise.abs()
        else:
            tensors[key] = noise * (0.7 / math.sqrt(math.prod(size[1:])) if len(size) > 1 else 0.2)
    return tensors


def _add(file: LayoutFile, keys: dict[str, tuple[tuple[int, ...], torch.dtype, bool]]) -> None:
    twice = keys.keys() & file.keys.keys()
    assert not twice, f"{file.path}: {sorted(twice)[:3]} are listed twice"
    file.keys.update(keys)


def _tensors(line: str, prefix: str, values: dict[str, int]) -> Iterator[tuple[str, tuple]]:
    line = re.sub(r"<(\d*)(\w+?)>", lambda match: str(int(match[1] or 1) * values[match[2]]), line)
    words = line.split()
    if words[0] == "use":
        inner = {name: int(value) for name, value in (word.split("=") for word in words[3:])}
        under = prefix + words[2].strip('"')
        for inner_line in _lines(FOLDER / "parts" / f"{words[1]}.txt"):
            yield from _tensors(inner_line, under, inner)
        return
    shape = () if words[1] == "scalar" else tuple(int(size) for size in words[1].split("x"))
    dtype = torch.int64 if "int64" in words[2:] else torch.float32
    for key in _expand(prefix + words[0]):
        yield key, (shape, dtype, "arange" in words[2:])


def _expand(text: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]+)\}", text)
    if match is None:
        yield text
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    choices = map(str, range(int(span[1]), int(span[2]) + 1)) if span else match[1].split(",")
    for choice in choices:
        yield from _expand(text[: match.start()] + choice + text[match.end() :])


def _lines(path: Path) -> Iterator[str]:
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            yield line
