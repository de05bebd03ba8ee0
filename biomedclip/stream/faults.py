"""Why a sample's bytes cannot be had, as classes of DataError: each has the ledger's word for it.

A fault of the bytes is a fact of one sample, which is counted and replaced by another one. `Unreachable` of
`biomedclip.stream.fetch` is not among them: a host that is away says nothing about a sample.
"""

from __future__ import annotations

from typing import ClassVar

from biomedclip.errors import DataError


class Fault(DataError):
    """Bytes of a sample that cannot be had or are not what they should be."""

    reason: ClassVar[str] = "unreadable"


class Missing(Fault):
    """There is no such file, or it may not be read."""

    reason = "missing"


class CutOff(Fault):
    """The file ends before the sample does."""

    reason = "cut_off"


class Replaced(Fault):
    """The file is another one than when its index was read."""

    reason = "replaced"


class WrongBytes(Fault):
    """The bytes are not those whose checksum the index holds, or belong to another sample."""

    reason = "wrong_bytes"


class NoCaption(Fault):
    """The caption is missing, empty or no text."""

    reason = "no_caption"


class BrokenImage(Fault):
    """The picture does not decode."""

    reason = "broken_image"
