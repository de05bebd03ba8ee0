"""What the contamination check of the training data says, as one line beside a number.

Reads `leakage.json`, which the builders write next to a data set they compared with evaluation sets; yields plain facts
for a result. Without such a file leakage is unknown, which is not none, and the report says unknown.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from biomedclip.errors import DataError


def read_leakage(path: str | None) -> dict[str, Any]:
    """`status`: unknown, none, found or dropped; `text` for a table; `found` and `compared_with` where checked.

    `path` is a `leakage.json` or the folder it lies in. Raises DataError for a file that is none.
    """
    if path is None:
        return {"status": "unknown", "text": "not checked"}
    file = Path(path) / "leakage.json" if Path(path).is_dir() else Path(path)
    try:
        report = json.loads(file.read_bytes())
        found = {rule: int(report["found"][rule]) for rule in ("group", "pixels", "near")}
        names = [str(entry["name"]) for entry in report["compared_with"]]
        mode = str(report["mode"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(file, "is no leakage report", found=str(error)[:80], todo="name the leakage.json of a data set"
                        ) from None  # fmt: skip
    total = sum(found.values())
    if mode == "off" or not names:
        return {"status": "unknown", "text": "not compared", "file": str(file)}
    status = "none" if not total else "dropped" if mode == "drop" else "found"
    text = {"none": "none found", "dropped": f"{total:,} found and dropped", "found": f"{total:,} found"}[status]
    return {"status": status, "text": text, "found": found, "compared_with": names, "file": file.name}
