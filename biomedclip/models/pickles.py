"""Tensors out of a weights file, without running what is in it.

Reads safetensors, and PyTorch's zip and legacy pickles through torch's `weights_only` unpickler with a short list of
harmless names that a model's facts may allow; yields plain `{key: tensor}`. What a file is is told by its first bytes,
not by its name: a gate's web page saved as `pytorch_model.bin` is the most common wrong file. Pickles that need
arbitrary code are opened only where the caller says `trust_pickle=True`.
"""

from __future__ import annotations

import importlib
import json
import pickle
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from biomedclip.errors import CheckpointError
from biomedclip.files import explain_full_disk, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["safetensors", "zip pickle", "legacy pickle", "TorchScript archive", "zip archive", "tar archive"]


def read_tensors(
    path: str | Path,
    *,
    unwrap: Sequence[str] = (),
    safe_globals: Sequence[str] = (),
    inert_globals: Sequence[str] = (),
    trust_pickle: bool = False,
) -> dict[str, Tensor]:
    """The tensors of a file on the CPU, mapped from disk where its format allows.

    `unwrap` names entries under which they may lie, outermost first. Raises CheckpointError where the file is missing,
    cut short, something else, or a pickle that would run code and `trust_pickle` is not set.
    """
    path = Path(path)
    kind = file_kind(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    if kind not in ("zip pickle", "legacy pickle"):
        raise CheckpointError(path, "is no file of tensors", found=f"a {kind}", todo=_REMEDY.get(kind, "name another"))
    value = _unpickle(path, kind, safe_globals, inert_globals, trust_pickle)
    return _unwrap(path, value, unwrap)


def read_shapes(path: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every key of a safetensors file, from its header alone."""
    with Path(path).open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    return {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in header.items() if key != "__metadata__"}


def file_kind(path: str | Path) -> Kind:
    """What a weights file is, by its bytes. Raises CheckpointError where it is none, saying what it is instead."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise CheckpointError(path, "there is no such file", todo="check the path") from None
    except IsADirectoryError:
        raise CheckpointError(path, "is a folder, not a weights file", todo="name the file in it") from None
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 100_000_000:
        return "safetensors"
    if head[:2] == b"PK":
        return _zip_kind(path)
    if head[:1] == b"\x80":
        return "legacy pickle"
    if head[257:262] == b"ustar":
        return "tar archive"
    raise CheckpointError(path, "is no weights file", found=_describe_head(head), todo=_remedy(head))


def extract_member(archive: str | Path, member: str, target: str | Path) -> Path:
    """Copy one file out of a zip or tar archive to `target`; an existing target is kept. Raises CheckpointError."""
    archive, target = Path(archive), Path(target)
    if target.exists():
        return target
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as box, box.open(_one_name(archive, box.namelist(), member)) as source:
                _copy(source, target)
        else:
            with tarfile.open(archive) as tar:
                inner = tar.extractfile(_one_name(archive, tar.getnames(), member))
                if inner is None:
                    raise CheckpointError(archive, f"holds '{member}' as a folder", todo="download it again")
                _copy(inner, target)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise CheckpointError(
            archive, "is a broken archive", found=str(error)[:120], todo="delete it and download it again"
        ) from error
    return target


def _one_name(archive: Path, names: Sequence[str], member: str) -> str:
    found = [name for name in names if name == member or name.endswith(f"/{member}")]
    if len(found) != 1:
        listed = ", ".join(list(names)[:6]) or "nothing"
        raise CheckpointError(archive, f"holds {len(found)} files '{member}'", found=listed, todo="check the archive")
    return found[0]


def _copy(source: Any, target: Path) -> None:
    with explain_full_disk(target.parent), write_atomic(target) as file:
        while chunk := source.read(1 << 22):
            file.write(chunk)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (it is no mapping)
                tensor = file.get_tensor(key)
                # The format packs tensors without gaps. Off the lines of the cache they are slower, and their sums
                # differ in the last bit from those of the same weights elsewhere.
                tensors[key] = tensor.clone() if tensor.data_ptr() % _CACHE_LINE else tensor
        return tensors
    except SafetensorError as error:
        raise CheckpointError(
            path, "is a broken or cut short safetensors file", found=str(error)[:120],
            todo="delete it and download it again",
        ) from error  # fmt: skip


class _Inert:
    """Stands for an object that is no weight: takes any call, state or item, and keeps nothing."""

    def __new__(cls, *args: Any, **options: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        """Accept what the named class would have been given."""

    def __setstate__(self, state: Any) -> None:
        """Forget it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forget it."""


def _unpickle(
    path: Path, kind: Kind, safe_globals: Sequence[str], inert_globals: Sequence[str], trust_pickle: bool
) -> Any:
    import torch

    allowed = [found for name in safe_globals for found in _safe_objects(name)]
    allowed += [(_Inert, name) for name in inert_globals]
    mapped = kind == "zip pickle"
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            # The unpickler knows the later protocols too; what it does not know it refuses.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"(?:class|function) (\S+)", str(error))
        if not trust_pickle:
            found = f"it names {named.group(1)}" if named else " ".join(str(error).split())[:120]
            raise CheckpointError(
                path, "is a pickle of more than tensors and was not opened", found=found,
                todo="ask its publisher for safetensors, or, where you trust whoever made the file, trust_pickle=True"
                " (--trust-pickle), which runs the code in it",
            ) from error  # fmt: skip
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            path, "is a broken or cut short PyTorch file", found=" ".join(str(error).split())[:120] or repr(error),
            todo="delete it and download it again",
        ) from error  # fmt: skip
    return torch.load(path, map_location="cpu", weights_only=False, mmap=mapped)


def _safe_objects(name: str) -> list[Any]:
    """What torch's unpickler must be told for one name of `zoo.SafeGlobal`."""
    import numpy as np

    module, _, attribute = name.rpartition(".")
    if name == "numpy.core.multiarray.scalar":
        # numpy 2 moved it; old files say the old place, new ones the new.
        scalar = importlib.import_module("numpy._core.multiarray").scalar
        return [(scalar, name), (scalar, "numpy._core.multiarray.scalar")]
    if name == "numpy.dtype":
        kinds = [np.dtype(code) for code in "?bBhHiIqQefdU"]
        return [np.dtype, *{type(kind) for kind in kinds}]
    return [(getattr(importlib.import_module(module), attribute), name)]


def _unwrap(path: Path, value: Any, unwrap: Sequence[str]) -> dict[str, Tensor]:
    import torch

    for name in unwrap:
        if isinstance(value, Mapping) and isinstance(value.get(name), Mapping):
            value = value[name]
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if isinstance(value, torch.Tensor):
        # A file of one bare tensor (PMC-CLIP's projection): the facts' prefix is its whole key.
        return {"": value}
    if not isinstance(value, Mapping):
        raise CheckpointError(path, "holds no table of tensors", found=type(value).__name__, todo="name another file")
    strange = [str(key) for key, entry in value.items() if not isinstance(entry, torch.Tensor)]
    if strange:
        raise CheckpointError(
            path, "holds more than tensors where the weights should be", found=", ".join(strange[:6]),
            todo="check that it is this model's file",
        )  # fmt: skip
    return dict(value)


def _zip_kind(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as box:
            names = box.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(
            path, "is a cut short or broken PyTorch file", found=f"{path.stat().st_size:,} bytes, {error}",
            todo="delete it and download it again",
        ) from None  # fmt: skip
    if any(name.endswith(("/constants.pkl", "/code/__torch__.py")) for name in names):
        return "TorchScript archive"
    if any(name.endswith("data.pkl") for name in names):
        return "zip pickle"
    return "zip archive"


_CACHE_LINE = 64
_REMEDY = {
    "TorchScript archive": "it holds code; take the same weights as safetensors or as a state dict",
    "zip archive": "unpack it and name the weights file inside",
    "tar archive": "unpack it and name the weights file inside",
}


def _describe_head(head: bytes) -> str:
    if not head:
        return "0 bytes"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    if head.lstrip()[:1] == b"<":
        return "a web page"
    return f"first bytes {head[:8].hex()}"


def _remedy(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "fetch the file itself: git lfs pull"
    if head.lstrip()[:1] == b"<":
        return "log in or accept the terms on its page, then download it again"
    return "download it again, and check that it is the weights file"
