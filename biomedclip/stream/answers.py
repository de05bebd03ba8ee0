"""What an answer to a range request means: the bytes that were asked for, a fault that may pass, or one that will not.

Servers may ignore a range, send another one, compress it, or leave out its length; only bytes that are known to be
whole and from the asked place come through.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from biomedclip.stream.addresses import refuse
from biomedclip.stream.faults import Missing, Replaced
from biomedclip.stream.transport import Answer, Trouble


@dataclass(frozen=True, slots=True)
class Found:
    """Bytes of a file, its whole size, and its ETag (or modification date; None where the server names neither)."""

    data: bytes
    total: int
    etag: str | None


def judge(answer: Answer, url: str, start: int, stop: int | None, etag: str | None) -> Found:
    """The bytes of a good answer. Raises Trouble for faults that may pass, DataError for those that will not."""
    headers = answer.headers
    etag = etag or headers.get("ETag") or headers.get("Last-Modified")
    if answer.status in (200, 206) and headers.get("Content-Encoding", "identity") != "identity":
        raise Trouble("protocol", f"the answer is encoded: {headers['Content-Encoding']}")
    if answer.status == 200:
        if headers.get("Content-Length") is None and headers.get("Transfer-Encoding") != "chunked":
            raise Trouble("protocol", "the answer has no length, so nothing would tell that it was cut off")
        return Found(answer.body if stop is None else answer.body[start:stop], len(answer.body), etag)
    if answer.status == 206:
        said = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", "").strip())
        if not said or stop is None:
            raise Trouble("protocol", f"Content-Range is {headers.get('Content-Range')!r}")
        first, last, total = map(int, said.groups())
        if (first, last + 1) != (start, min(stop, total)):
            raise Trouble("protocol", f"bytes {first}-{last} came where {start}-{stop - 1} were asked for")
        if len(answer.body) != last + 1 - first:
            raise Trouble("truncated", f"{len(answer.body)} of {last + 1 - first} bytes")
        return Found(answer.body, total, etag)
    if answer.status in (429, 503):
        raise Trouble("throttled", f"status {answer.status}", _retry_after(headers.get("Retry-After")))
    if answer.status >= 500 or answer.status == 408:
        raise Trouble("server_error", f"status {answer.status}")
    if answer.status in (404, 410):
        refuse(url, "is missing", f"status {answer.status}", "check the address", Missing)
    if answer.status == 416:
        size = (headers.get("Content-Range") or "").rpartition("/")[2]
        if size.isdecimal() and int(size) == 0 == start:
            return Found(b"", 0, etag)
        refuse(url, "was replaced or cut off since its index was read", f"no byte {start}", "upload the tar again",
               Replaced)  # fmt: skip
    if answer.status in (401, 403):
        todo = {
            "hf": "log in with `hf auth login`, or ask for access",
            "s3": "make it public, or run: pip install 'biomedclip[s3]' and give AWS credentials that may read it",
        }.get(url.partition(":")[0], "make it public")
        refuse(url, "may not be read", f"status {answer.status}", todo, Missing)
    refuse(url, "cannot be read", f"status {answer.status}")


def _retry_after(text: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number or a date."""
    if text is None:
        return None
    try:
        return max(float(text), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
