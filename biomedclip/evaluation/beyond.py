"""What else a config may ask of a task: everything beside the numbers of its own metrics.

Reads a scored task and the config; yields plain numbers for the result's `beyond` part, one key for each section asked
for. What is learnt or chosen on other splits is in learnt.py, what the scored images themselves are put through in
stress.py. A section that a task cannot have says why instead of a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from biomedclip.errors import BiomedclipError
from biomedclip.evaluation import learnt, stress
from biomedclip.evaluation.config import EvaluateConfig
from biomedclip.evaluation.scored import Scored
from biomedclip.evaluation.scores import ClassScores, RankScores

_ANY_KIND = ("composition", "subgroups", "wise")


def measure_beyond(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """{section: numbers}, or {section: {"reason": why not}}, for the sections that the config asks for."""
    found: dict[str, Any] = {}
    for name, run in _asked(scored, config).items():
        if name not in _ANY_KIND and not isinstance(scored.scores, ClassScores):
            found[name] = {"reason": "only for tasks with one class an image"}
        elif name not in _ANY_KIND and scored.task.pool:
            found[name] = {"reason": "not for slides pooled from patches"}
        else:
            try:
                found[name] = run()
            except (BiomedclipError, ValueError) as error:
                found[name] = {"reason": str(error)[:300]}
    return as_json(found)


def _asked(scored: Scored, config: EvaluateConfig) -> dict[str, Callable[[], Any]]:
    """The sections that the config asks of this task."""
    name = scored.task.name
    asked = {
        "adapters": (bool(config.adapters), learnt.run_adapters),
        "few_shot": (config.few_shot is not None, learnt.run_few_shot),
        "calibration": (config.calibration, learnt.run_calibration),
        "prior_correction": (config.prior_correction, learnt.run_prior),
        "perception": (name in config.perception, learnt.run_perception),
        "wise": (config.wise is not None, learnt.run_wise),
        "prompt_sensitivity": (config.prompt_sensitivity is not None, stress.run_sensitivity),
        "corruptions": (bool(config.corruptions), stress.run_corruptions),
        "ood": (config.ood is not None and name not in (*config.ood.near, *config.ood.far), stress.run_outside),
        "subgroups": (name in config.subgroups, stress.run_subgroups),
        "backgrounds": (name in config.backgrounds, stress.run_backgrounds),
        "composition": (config.composition and isinstance(scored.scores, RankScores), stress.run_composition),
    }
    return {section: partial(run, scored, config) for section, (wanted, run) in asked.items() if wanted}


def as_json(value: Any) -> Any:
    """Numbers that are undefined become null; keys become text."""
    if isinstance(value, Mapping):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return None if not np.isfinite(value) else float(value)
    return int(value) if isinstance(value, np.integer) else value
