"""What the page shows: dataset and results folders by name, a model, and what is opened from them.

The page speaks of folders by names that are made here and never takes a path from a browser, so no request can name a
file outside of what the command was given. Datasets, indexes and the model are opened when a tab first needs them,
which lets the page stand within seconds.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.errors import ConfigError, DataError
from biomedclip.progress import Progress, silent
from biomedclip.shards import DatasetFolder

if TYPE_CHECKING:
    from biomedclip.app.encoder import Encoder
    from biomedclip.app.search import SearchIndex


@dataclass
class Holdings:
    """Folders by the names that the page shows, and the model by the name that `biomedclip.load` takes."""

    datasets: Mapping[str, Path] = field(default_factory=dict)
    results: Mapping[str, Path] = field(default_factory=dict)
    model: str = "biomedclip-mini"

    def __post_init__(self) -> None:
        self._opened: dict[tuple[str, str], Any] = {}
        self._locks: defaultdict[tuple[str, str], threading.Lock] = defaultdict(threading.Lock)

    def dataset(self, name: str) -> DatasetFolder:
        """A dataset by its name. Raises DataError where it is none of the page's or cannot be read."""
        made: DatasetFolder = self._open("dataset", name, lambda: DatasetFolder(_pick(self.datasets, name)))
        return made

    def encoder(self) -> Encoder:
        """The model, loaded once. Raises CheckpointError as `biomedclip.load` does."""
        from biomedclip.app.encoder import Encoder

        made: Encoder = self._open("encoder", self.model, lambda: Encoder(self.model))
        return made

    def index(self, name: str, progress: Progress = silent) -> SearchIndex:
        """The searchable figures of a dataset, indexed now where they are not yet. Raises as `open_index` does."""
        from biomedclip.app.search import open_index

        dataset, encoder = self.dataset(name), self.encoder()
        made: SearchIndex = self._open("index", name, lambda: open_index(dataset, encoder, progress=progress))
        return made

    def results_folder(self, name: str) -> Path:
        """A results folder by its name. Raises DataError where it is none of the page's."""
        return _pick(self.results, name)

    def _open(self, kind: str, name: str, make: Callable[[], Any]) -> Any:
        # Two browsers that ask first at once must not load a model twice; one that indexes must not hold up the others.
        with self._locks[kind, name]:
            if (kind, name) not in self._opened:
                self._opened[kind, name] = make()
            return self._opened[kind, name]


def open_holdings(datasets: Iterable[Path], results: Iterable[Path], model: str) -> Holdings:
    """The page's folders and model. Raises ConfigError for what is no folder and DataError for what is no dataset."""
    found = Holdings(name_folders(datasets, "--dataset"), name_folders(results, "--results"), model)
    for name in found.datasets:
        found.dataset(name)
    return found


def name_folders(folders: Iterable[Path], option: str) -> dict[str, Path]:
    """{shown name: folder}, a folder's own name with its parent's where two are called alike.

    Raises ConfigError where one is no folder.
    """
    resolved = list(dict.fromkeys(Path(folder).expanduser().resolve() for folder in folders))
    for folder in resolved:
        if not folder.is_dir():
            raise ConfigError(option, "there is no such folder", found=folder, todo="name one that exists")
    ends = [folder.name for folder in resolved]
    return {folder.name if ends.count(folder.name) == 1 and folder.name else str(folder): folder for folder in resolved}


def _pick(folders: Mapping[str, Path], name: str) -> Path:
    if name not in folders:
        raise DataError(name or "nothing", "is not one of the folders of this page", todo="choose one from the list")
    return folders[name]
