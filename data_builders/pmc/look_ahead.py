"""Articles of the bucket read many at a time, their pairs in the order of the plan, within a bound of memory.

An article is one request for its XML and then one a picture, so speed over a network comes from many articles under
way. Each of the client's threads takes one article from first to last. Those that run far ahead while the one whose
turn it is still waits for a slow answer would fill memory, so a `_Window` holds new articles back while finished ones
hold too many bytes; the one whose turn it is always goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError

from biomedclip.schema import Article, Drop, Pair
from data_builders.pmc.catalog import ArticleRecord
from data_builders.pmc.client import Client

MAX_WAITING_BYTES = 256 * 2**20
"""Image bytes of finished articles that may wait for their turn."""

Items = list[Article | Pair | Drop]


def read_ahead(
    client: Client,
    records: Iterable[ArticleRecord],
    read: Callable[[ArticleRecord], Iterable[Article | Pair | Drop]],
    *,
    max_waiting_bytes: int = MAX_WAITING_BYTES,
) -> Iterator[Items]:
    """What `read` yields for each record, as a list, in the order of the records; the client's threads run `read`."""
    window = _Window(max_waiting_bytes)

    def read_one(numbered: tuple[int, ArticleRecord]) -> tuple[Items, int]:
        number, record = numbered
        window.enter(number)
        items = list(read(record))
        size = sum(len(item.image) for item in items if isinstance(item, Pair))
        window.put(size)
        return items, size

    try:
        for items, size in client.map(read_one, enumerate(records)):
            window.take(size)
            yield items
    finally:
        window.close()


class _Window:
    """Counts the bytes that wait, and lets articles begin while they are few."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._waiting = 0
        self._due = 0
        self._closed = False
        self._changed = threading.Condition()

    def enter(self, number: int) -> None:
        """Wait until the article may begin. Raises CancelledError once closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or number <= self._due or self._waiting < self._max_bytes
            )  # fmt: skip
            if self._closed:
                raise CancelledError("nobody waits for this article any more")

    def put(self, size: int) -> None:
        with self._changed:
            self._waiting += size

    def take(self, size: int) -> None:
        """Note that the article whose turn it was has been taken."""
        with self._changed:
            self._waiting -= size
            self._due += 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
