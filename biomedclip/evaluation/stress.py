"""What the scored images are put through: other words, corruptions, outsiders, subgroups, backgrounds, foils.

Reads a scored task; yields plain numbers. Nothing is fitted here but out-of-distribution scores that need training
images, which come from the training split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.errors import DataError
from biomedclip.evaluation import metrics, ood
from biomedclip.evaluation.composition import pair_credit, swap_finding, swap_side, turn_negation
from biomedclip.evaluation.config import EvaluateConfig
from biomedclip.evaluation.fairness import background_gap, measure_subgroups
from biomedclip.evaluation.prompts import fill
from biomedclip.evaluation.robustness import CORRUPTIONS, corruption_reader, summarise_corruptions
from biomedclip.evaluation.scored import Scored, Vectors
from biomedclip.evaluation.scores import ClassScores, predict, statistics_of
from biomedclip.evaluation.sensitivity import prompt_sensitivity
from biomedclip.evaluation.zero_shot import score_classes

SEVERITIES = (1, 3, 5)


def run_sensitivity(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """min, quartiles and max of the balanced accuracy of random single prompts, and every value."""
    scores, draws = scored.class_scores, config.prompt_sensitivity.k if config.prompt_sensitivity else 2

    def score(cosines: Vectors) -> float:
        return float(metrics.balanced_accuracy(metrics.confusion(scores.y, cosines.argmax(1), len(scores.classes))))

    found = prompt_sensitivity(scored.images, scored.prompts, score, draws=draws, seed=config.seed)
    return {"metric": "balanced_accuracy", **found.summarise(), "values": found.values.tolist()}


def run_corruptions(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """Balanced accuracy of each corruption at severities 1, 3 and 5, and what is kept of the score above chance."""
    from biomedclip.layouts import read_rgb

    scores = scored.class_scores
    num_classes = len(scores.classes)
    label = {entry.label: c for c, entry in enumerate(scored.task.classes)}
    by_id = {row.sample_id: label[row.labels[0]] for row in scored.rows}
    names = tuple(CORRUPTIONS) if config.corruptions is True else tuple(config.corruptions or ())

    def value(name: str, severity: int) -> float:
        embedded = scored.embed(scored.manifest, corruption_reader(read_rgb, name, severity, seed=config.seed))
        cosines = score_classes(embedded.vectors, scored.prompts, scored.task.ensemble, scored.logit_scale)
        y = [by_id[i] for i in embedded.sample_ids]
        return float(metrics.balanced_accuracy(metrics.confusion(y, cosines.argmax(1), num_classes)))

    clean = float(metrics.balanced_accuracy(metrics.confusion(scores.y, predict(scores), num_classes)))
    values = {name: {severity: value(name, severity) for severity in SEVERITIES} for name in names}
    return {"metric": "balanced_accuracy", **summarise_corruptions(clean, values, 1 / num_classes), "values": values}


def run_outside(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """{score: {near, far: sets and mean}} of every rule that the task's data allows, against other tasks' images.

    MSP, MaxLogit, energy, MCM and entropy need the cosines alone; CLIPN's two rules templates that deny a class; k-NN,
    Mahalanobis and ViM the training split.
    """
    if config.ood is None:
        return {}
    home, scale = scored.task.name, scored.logit_scale
    vectors = {home: scored.images, **{name: scored.outside(name) for name in (*config.ood.near, *config.ood.far)}}
    cosines = {n: score_classes(v, scored.prompts, scored.task.ensemble, scale) for n, v in vectors.items()}
    rules: dict[str, Callable[[str], NDArray[Any]]] = {
        "msp": lambda n: ood.msp(cosines[n], scale), "max_logit": lambda n: ood.max_logit(cosines[n]),
        "energy": lambda n: ood.energy(cosines[n], scale), "mcm": lambda n: ood.mcm(cosines[n]),
        "entropy": lambda n: ood.negative_entropy(cosines[n], scale),
    }  # fmt: skip
    found: dict[str, Any] = {}
    if config.ood.no_templates:
        denied = [scored.embed_texts([fill(t, entry.name) for t in config.ood.no_templates])
                  for entry in scored.task.classes]  # fmt: skip
        no = {n: score_classes(v, denied, scored.task.ensemble, scale) for n, v in vectors.items()}
        for rule in ("ctw", "atd"):
            rules[f"no_{rule}"] = lambda n, rule=rule: ood.no_prompts(cosines[n], no[n], scale)[rule]  # type: ignore[misc]
    try:
        train = scored.features("train")
        own = score_classes(train.vectors, scored.prompts, scored.task.ensemble, scale)
        rules["knn"] = lambda n: ood.nearest_distance(vectors[n], train.vectors, min(50, len(train.y)))
        rules["mahalanobis"] = lambda n: ood.mahalanobis(vectors[n], train.vectors, train.y)
        rules["vim"] = lambda n: ood.vim(vectors[n], cosines[n], train.vectors, own, scale)
    except DataError as error:
        found["skipped"] = {"knn, mahalanobis, vim": str(error)[:200]}
    outside = {kind: list(names) for kind, names in (("near", config.ood.near), ("far", config.ood.far)) if names}
    return found | {name: ood.near_and_far(rule, home, outside) for name, rule in rules.items()}


def run_subgroups(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """The primary metric of every value of the attribute, with intervals; worst group, gap, equity-scaled value."""
    attribute, scores = config.subgroups[scored.task.name], scored.class_scores
    values = _attribute(scored, attribute, "subgroups")
    name = scored.task.metrics.primary

    def measure(rows: NDArray[np.int64], weights: NDArray[np.float64] | None) -> Any:
        return statistics_of(_take(scores, rows), (name,))[name](weights)

    found = measure_subgroups(measure, values, groups=scores.group_ids, y=scores.y, resamples=config.bootstrap.n,
                              seed=config.seed)  # fmt: skip
    groups = [
        {"name": g.name, "n": g.n, "value": g.value, "reason": g.reason,
         "ci_low": g.interval.low if g.interval else None, "ci_high": g.interval.high if g.interval else None}
        for g in found.groups
    ]  # fmt: skip
    return {"attribute": attribute, "metric": name, "overall": found.overall, "groups": groups, "gap": found.gap,
            "worst": found.worst, "equity_scaled": found.equity_scaled, "missing": found.missing}  # fmt: skip


def run_backgrounds(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """Accuracy of every class on every background, the worst, the mean and the gap between them."""
    attribute, scores = config.backgrounds[scored.task.name], scored.class_scores
    values = _attribute(scored, attribute, "backgrounds")
    names = [scores.classes[c] for c in scores.y.tolist()]
    return {"attribute": attribute, **background_gap(predict(scores) == scores.y, names, values)}


def run_composition(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """{side, negation, finding: share of captions preferred to their foil, n, and how many captions have none}."""
    captions = [str(row.text) for row in scored.rows]
    kinds: dict[str, Callable[[str], str | None]] = {
        "side": swap_side, "negation": turn_negation,
        "finding": lambda caption: swap_finding(caption, config.findings, config.seed),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, change in kinds.items():
        foils = [change(caption) for caption in captions]
        kept = [i for i, foil in enumerate(foils) if foil is not None]
        if not kept:
            found[name] = {"reason": "no caption has anything to change", "without_foil": len(foils)}
            continue
        own = scored.embed_texts([captions[i] for i in kept])
        other = scored.embed_texts([str(foils[i]) for i in kept])
        images = scored.images[kept]
        credit = pair_credit((images * own).sum(1), (images * other).sum(1))
        found[name] = {"accuracy": float(credit.mean()), "chance": 0.5, "n": len(kept),
                       "without_foil": len(foils) - len(kept)}  # fmt: skip
    return found


def _attribute(scored: Scored, attribute: str, section: str) -> list[str | None]:
    """Its value in each scored row. Raises DataError where no row has it."""
    values = [row.attributes.get(attribute) for row in scored.rows]
    if not any(values):
        known = sorted({key for row in scored.rows for key in row.attributes})
        raise DataError(f"{section}.{scored.task.name}", f"no row has the attribute '{attribute}'",
                        found=", ".join(known) or "no attributes")  # fmt: skip
    return values


def _take(scores: ClassScores, rows: NDArray[np.int64]) -> ClassScores:
    return replace(scores, sample_ids=tuple(scores.sample_ids[i] for i in rows), y=scores.y[rows],
                   cosines=scores.cosines[rows], group_ids=None)  # fmt: skip
