"""Sources of a plan without any data behind them, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from biomedclip.files import sha256_json
from biomedclip.stream.plan import PlanSource


def plan_source(
    name: str,
    rows: int,
    weight: Any = 1.0,
    *,
    articles: Sequence[int] | np.ndarray | None = None,
    captions: Sequence[int] | np.ndarray | None = None,
    shards: int = 1,
    **more: Any,
) -> PlanSource:
    """A source of so many rows in so many shards, with these ids of articles and captions."""
    alone = np.full(rows, -1, dtype=np.int64)
    kin = [alone if ids is None else np.asarray(ids, dtype=np.int64) for ids in (articles, captions)]
    bounds = np.linspace(0, rows, shards + 1).astype(np.int64)
    content = sha256_json([name, rows, *(ids.tolist() for ids in kin)])
    return PlanSource(name=name, weight=weight, bounds=bounds, kin=lambda places: tuple(ids[places] for ids in kin),
                      content=content, **more)  # fmt: skip
