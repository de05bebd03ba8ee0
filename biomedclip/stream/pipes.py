"""Addresses of tars that can only be read from their beginning, and what a config says of such a source.

Takes addresses, says whether `biomedclip.stream.unindexed` must read them; imports no torch, because a dry run says
what such a source cannot promise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from biomedclip.stream.presets import Augmentation

SCHEMES = ("pipe", "sftp", "ftps", "scp", "gs", "htgs", "ais")
"""What webdataset opens and nothing else here does; `-` is standard input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnindexedSource:
    """Tars that are read from their beginning, and their share of every batch."""

    name: str
    addresses: tuple[str, ...]
    weight: float = 1.0
    augmentation: str | Augmentation = "auto"
    allow_pipe: bool = False
    """Run the commands of `pipe:` addresses in a shell."""

    @property
    def notice(self) -> str:
        """What a run must say of it."""
        return (
            f"{self.name}: cannot be indexed and is read by webdataset: no exact resume, unknown size, articles may "
            "meet in a batch"
        )


def is_unindexed(address: str) -> bool:
    """Whether tars at an address can only be read from their beginning."""
    return address == "-" or re.match(rf"({'|'.join(SCHEMES)}):", address) is not None


def expand_addresses(addresses: Sequence[str]) -> tuple[str, ...]:
    """The addresses that brace lists name: `pipe:curl -s https://host/{000..099}.tar` is a hundred commands."""
    from braceexpand import braceexpand

    return tuple(one for address in addresses for one in braceexpand(address))
