"""biomedclip: build, train, evaluate and load vision-language models for biomedical images.

The public names are resolved on first use (PEP 562), so `import biomedclip` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "BiomedclipError": "biomedclip.errors",
    "CheckpointError": "biomedclip.errors",
    "ConfigError": "biomedclip.errors",
    "DataError": "biomedclip.errors",
    "DatasetFolder": "biomedclip.shards",
    "DatasetWriter": "biomedclip.shards",
    "MissingExtra": "biomedclip.errors",
    "evaluate": "biomedclip.evaluation.evaluate",
    "load": "biomedclip.models.load",
    "train": "biomedclip.training.train",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'biomedclip' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
