"""Labels for pictures that were found some other way: from their path, or from a table joined by a key.

Shared by the layouts whose pictures say more of themselves than a row of a table does (DICOM files, volumes). Keys may
be ids of patients, so a row that is repeated or has no picture is named by a hash of its key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from biomedclip.errors import ConfigError, DataError
from biomedclip.layouts.manifest import compile_pattern, hash_id, name_split
from biomedclip.layouts.tables import Columns, read_rows
from biomedclip.schema import Drop, LabelKind


class JoinedLabels:
    """The labels of pictures, by path or by key, and what became of the table's rows."""

    def __init__(
        self,
        root: Path,
        name: str,
        meaning: Columns,
        *,
        pattern: str | None,
        table: str | None,
        key: str | None,
        duplicates: str,
        encoding: str,
    ) -> None:
        if (pattern is None) == (table is None) or (table is None) != (key is None):
            raise ConfigError("layout.table", "with key, or else pattern, says what the labels are",
                              todo="give one of them")  # fmt: skip
        self._name, self._meaning = name, meaning
        self._pattern = compile_pattern(pattern, "pattern", groups=["label"]) if pattern else None
        self._rows: dict[str, dict[str, Any]] = {}
        self._used: set[str] = set()
        self._repeated: list[Drop] = []
        if table and key:
            self._read(root, table, key, duplicates, encoding)

    @property
    def kind(self) -> LabelKind:
        """What the options amount to."""
        return "single" if self._pattern else self._meaning.kind

    @property
    def reason(self) -> str:
        """Why a picture that `find` knows nothing of is dropped."""
        return "no_pattern_match" if self._pattern else "not_in_table"

    def find(self, path: str, key: str) -> dict[str, Any] | None:
        """Labels, split, text and attributes of a picture, as LabelledImage takes them; None where nothing is said."""
        if self._pattern is None:
            self._used.add(key)
            return self._rows.get(key)
        found = self._pattern.search(path)
        if found is None:
            return None
        word, part = found["label"], found.groupdict().get("split")
        split = name_split(part, "layout.pattern", self._meaning.splits) if part else None
        return {"labels": (self._meaning.names.get(word, word),), "split": split, "attributes": {}, "group_id": None}

    def drops(self) -> list[Drop]:
        """Rows that repeat another, and rows that no picture was found for so far."""
        lost = [Drop(source=self._name, item=hash_id(self._name, key), reason="missing_file")
                for key in self._rows if key not in self._used]  # fmt: skip
        return self._repeated + lost

    def _read(self, root: Path, table: str, key: str, duplicates: str, encoding: str) -> None:
        for where, cell, facts in read_rows(root, table, key, self._meaning, encoding=encoding):
            if cell not in self._rows:
                self._rows[cell] = facts
            elif self._rows[cell] != facts:
                raise DataError(where, "says something else than an earlier row of the same key", todo="remove one")
            elif duplicates == "refuse":
                raise DataError(where, "repeats an earlier row", todo="remove it, or say duplicates: drop")
            else:
                self._repeated.append(Drop(source=self._name, item=hash_id(self._name, cell), reason="duplicate_row",
                                           detail=where.rpartition(": ")[2]))  # fmt: skip
