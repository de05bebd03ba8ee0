"""WiSE-FT: the points between a model before and after training, and what each of them can do.

Wortsman et al. 2022: the curve of in-domain against general score along theta = (1 - a) theta_before + a theta_after
is the honest picture of continual pretraining: its ends are the two models, and a point between often keeps most of
both. How weights are mixed and carried is `biomedclip.training.wise`; here a model at a point is a context manager, so
that this room needs to know nothing of training. Which point to use is a choice, and made on validation data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation.adapters.features import Choice

ALPHAS = tuple(k / 10 for k in range(11))
Point = tuple[float, Mapping[str, float]]


def sweep_weights(
    at: Callable[[float], AbstractContextManager[Any]], evaluate: Callable[[], Mapping[str, float]],
    alphas: Sequence[float] = ALPHAS,
) -> Iterator[Point]:  # fmt: skip
    """(alpha, values) at each point; `evaluate` runs while the model carries the weights of `at(alpha)`."""
    for alpha in alphas:
        with at(alpha):
            values = evaluate()
        yield alpha, values


def choose_point(
    curve: Sequence[Point], metric: str, *, split: str, keep: Mapping[str, float] | None = None,
    scored_split: str = "test", allow_test: bool = False,
) -> Choice:  # fmt: skip
    """The point with the best `metric` among those whose other metrics keep at least `keep`; the nearest to the start
    of equals.

    `split` is where the curve was measured. Raises ConfigError where that is the split that is scored, unless allowed,
    DataError where no point keeps enough.
    """
    if split == scored_split and not allow_test:
        raise ConfigError("WiSE-FT", f"would choose a point on the split that is scored ('{split}')",
                          todo="measure the curve on a validation split")  # fmt: skip
    kept = [(a, v) for a, v in sorted(curve) if all(v[name] >= floor for name, floor in (keep or {}).items())]
    if not kept:
        raise DataError("WiSE-FT", "no point keeps what it should", found=dict(keep or {}), todo="lower the floor")
    alpha, values = max(kept, key=lambda point: point[1][metric])
    return Choice(
        hparams={"alpha": alpha}, split=split, on_test=split == scored_split, metric=metric, score=values[metric],
        table=tuple(({"alpha": a}, v[metric]) for a, v in sorted(curve)),
    )  # fmt: skip
