"""What else a config may ask of a task: adapters, few shots, calibration, corruptions, wording, subgroups, outsiders.

Reads the scored rows of a task with their embeddings and scores; yields plain numbers for the result's `beyond` part,
one key for each section asked for. Whatever is fitted or chosen is so on the training and validation splits, which
are embedded here through the same cache; a section that a task cannot have says why instead of a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.errors import BiomedclipError, DataError
from biomedclip.evaluation import calibration, metrics, ood
from biomedclip.evaluation.adapters.features import Features, Selection
from biomedclip.evaluation.config import EvaluateConfig
from biomedclip.evaluation.fairness import measure_subgroups
from biomedclip.evaluation.robustness import CORRUPTIONS, corruption_reader, summarise_corruptions
from biomedclip.evaluation.scores import ClassScores, RankScores, Scores, predict, statistics_of
from biomedclip.evaluation.sensitivity import prompt_sensitivity
from biomedclip.evaluation.tasks import Task
from biomedclip.evaluation.zero_shot import class_weights, score_classes
from biomedclip.schema import LabelledImage, Manifest

if TYPE_CHECKING:
    from biomedclip.evaluation.embed import ImageEmbeddings

Vectors = NDArray[np.float32]
SEVERITIES = (1, 3, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A task as it was scored, with the means to embed more."""

    task: Task
    manifest: Manifest
    rows: Sequence[LabelledImage]
    images: Vectors
    scores: Scores
    prompts: Sequence[Vectors]
    """Embeddings of each class's prompts; empty where the task has none."""
    logit_scale: float
    embed: Callable[..., ImageEmbeddings]
    """`embed(manifest, read=None)`"""
    embed_texts: Callable[[Sequence[str]], Vectors]
    read_split: Callable[[str], Manifest]
    """The manifest of another split of the task's data."""
    outside: Callable[[str], Vectors]
    """Embeddings of the scored images of another task of the run."""


def measure_beyond(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """{section: numbers}, or {section: {"reason": why not}}, for the sections that the config asks for."""
    sections: dict[str, Callable[[], Any]] = {}
    if config.adapters:
        sections["adapters"] = partial(run_adapters, scored, config)
    if config.few_shot:
        sections["few_shot"] = partial(run_few_shot, scored, config)
    if config.calibration:
        sections["calibration"] = partial(run_calibration, scored)
    if config.prompt_sensitivity:
        sections["prompt_sensitivity"] = partial(run_sensitivity, scored, config)
    if config.corruptions:
        sections["corruptions"] = partial(run_corruptions, scored, config)
    if config.ood and scored.task.name not in (*config.ood.near, *config.ood.far):
        sections["ood"] = partial(run_outside, scored, config)
    if scored.task.name in config.subgroups:
        sections["subgroups"] = partial(run_subgroups, scored, config)
    if config.composition and isinstance(scored.scores, RankScores):
        sections["composition"] = partial(run_composition, scored)
    found: dict[str, Any] = {}
    for name, run in sections.items():
        if name != "composition" and name != "subgroups" and not isinstance(scored.scores, ClassScores):
            found[name] = {"reason": "only for tasks with one class an image"}
        elif name not in ("composition", "subgroups") and scored.task.pool:
            found[name] = {"reason": "not for slides pooled from patches"}
        else:
            try:
                found[name] = run()
            except (BiomedclipError, ValueError) as error:
                found[name] = {"reason": str(error)[:300]}
    return _as_json(found)


def run_adapters(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """{method: metrics on the scored split, `selection`} next to the zero-shot values."""
    train, selection, test = _splits(scored, config)
    text = class_weights(scored.prompts)
    table: dict[str, Any] = {}
    for name in config.adapters:
        adapted = _fits()[name](train, selection, text=text, logit_scale=scored.logit_scale)
        logits = adapted.logits(test.vectors)
        confusion = metrics.confusion(test.y, logits.argmax(1), test.num_classes)
        table[name] = {
            "balanced_accuracy": float(metrics.balanced_accuracy(confusion)),
            "accuracy": float(metrics.accuracy(test.y, logits.argmax(1))),
            "auroc": float(metrics.macro_auroc(test.y, logits)), "n": len(test.y), "n_train": len(train.y),
            "selection": adapted.choice.describe(),
        }  # fmt: skip
    return table


def run_few_shot(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """{method: {shots: mean, sd, min, max, n}} of balanced accuracy, and which classes were short."""
    from biomedclip.evaluation.adapters.few_shot import FewShot, summarise_shots, sweep_shots

    if config.few_shot is None:
        return {}
    train, selection, test = _splits(scored, config)
    rows: list[FewShot] = []
    failed: dict[str, str] = {}
    for name in config.few_shot.methods:
        for shots in config.few_shot.shots:
            try:
                rows += sweep_shots(
                    {name: _fits()[name]}, train, selection, test, shots=(shots,),
                    seeds=range(config.few_shot.seeds), text=class_weights(scored.prompts),
                    logit_scale=scored.logit_scale,
                )  # fmt: skip
            except DataError as error:
                failed[f"{name}, K = {shots}"] = str(error)[:200]
    short = sorted({scored.task.classes[c].label for row in rows for c in row.short})
    tags = ["selected_on_test"] if any(row.choice.on_test for row in rows) else []
    return {"metric": selection.metric, "curves": summarise_shots(rows), "short": short, "failed": failed, "tags": tags}


def run_calibration(scored: Scored) -> dict[str, Any]:
    """Numbers at the model's own scale, after a temperature fitted on the selection split, and the diagram's points."""
    scores = _class_scores(scored)
    logits = scores.logit_scale * scores.cosines.astype(np.float64)
    shown = calibration.reliability(scores.y, metrics.softmax(logits))
    found = {
        "own_scale": calibration.calibrate(scores.y, logits),
        "reliability": {k: getattr(shown, k).tolist() for k in ("confidence", "accuracy", "count")},
    }
    if scored.task.select_split is None:
        return found | {"temperature": {"reason": "the task has no split to fit a temperature on"}}
    try:
        held = _features(scored, scored.task.select_split)
    except DataError as error:
        return found | {"temperature": {"reason": str(error)[:200]}}
    cosines = score_classes(held.vectors, scored.prompts, scored.task.ensemble, scored.logit_scale)
    temperature = calibration.fit_temperature(held.y, scored.logit_scale * cosines)
    after = calibration.calibrate(scores.y, logits, temperature)
    return found | {"temperature": {"value": temperature, "split": held.split, "n": len(held.y), **after}}


def run_sensitivity(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """min, quartiles and max of the balanced accuracy of random single prompts, and every value."""
    scores, draws = _class_scores(scored), config.prompt_sensitivity.k if config.prompt_sensitivity else 2

    def score(cosines: Vectors) -> float:
        return float(metrics.balanced_accuracy(metrics.confusion(scores.y, cosines.argmax(1), len(scores.classes))))

    found = prompt_sensitivity(scored.images, scored.prompts, score, draws=draws, seed=config.seed)
    return {"metric": "balanced_accuracy", **found.summarise(), "values": found.values.tolist()}


def run_corruptions(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """Balanced accuracy of each corruption at severities 1, 3 and 5, and what is kept of the score above chance."""
    from biomedclip.layouts import read_rgb

    scores = _class_scores(scored)
    num_classes = len(scores.classes)
    label = {entry.label: c for c, entry in enumerate(scored.task.classes)}
    by_id = {row.sample_id: label[row.labels[0]] for row in scored.rows}

    def value(name: str, severity: int) -> float:
        embedded = scored.embed(scored.manifest, corruption_reader(read_rgb, name, severity, seed=config.seed))
        cosines = score_classes(embedded.vectors, scored.prompts, scored.task.ensemble, scored.logit_scale)
        y = [by_id[i] for i in embedded.sample_ids]
        return float(metrics.balanced_accuracy(metrics.confusion(y, cosines.argmax(1), num_classes)))

    clean = float(metrics.balanced_accuracy(metrics.confusion(scores.y, predict(scores), num_classes)))
    values = {name: {severity: value(name, severity) for severity in SEVERITIES} for name in CORRUPTIONS}
    return {"metric": "balanced_accuracy", **summarise_corruptions(clean, values, 1 / num_classes), "values": values}


def run_outside(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """{score: {near, far: sets and mean}} of MSP, MaxLogit, energy, MCM and k-NN against other tasks' images."""
    if config.ood is None:
        return {}
    home, scale = scored.task.name, scored.logit_scale
    vectors = {home: scored.images, **{name: scored.outside(name) for name in (*config.ood.near, *config.ood.far)}}
    cosines = {n: score_classes(v, scored.prompts, scored.task.ensemble, scale) for n, v in vectors.items()}
    rules: dict[str, Callable[[str], NDArray[Any]]] = {
        "msp": lambda n: ood.msp(cosines[n], scale), "max_logit": lambda n: ood.max_logit(cosines[n]),
        "energy": lambda n: ood.energy(cosines[n], scale), "mcm": lambda n: ood.mcm(cosines[n]),
    }  # fmt: skip
    found: dict[str, Any] = {}
    try:
        train = _features(scored, "train")
        rules["knn"] = lambda n: ood.nearest_distance(vectors[n], train.vectors, min(50, len(train.y)))
        rules["mahalanobis"] = lambda n: ood.mahalanobis(vectors[n], train.vectors, train.y)
    except DataError as error:
        found["skipped"] = {"knn, mahalanobis": str(error)[:200]}
    outside = {kind: list(names) for kind, names in (("near", config.ood.near), ("far", config.ood.far)) if names}
    return found | {name: ood.near_and_far(rule, home, outside) for name, rule in rules.items()}


def run_subgroups(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """The primary metric of every value of the attribute, with intervals; worst group, gap, equity-scaled value."""
    attribute, scores = config.subgroups[scored.task.name], _class_scores(scored)
    values = [row.attributes.get(attribute) for row in scored.rows]
    if not any(values):
        known = sorted({key for row in scored.rows for key in row.attributes})
        raise DataError(f"subgroups.{scored.task.name}", f"no row has the attribute '{attribute}'",
                        found=", ".join(known) or "no attributes")  # fmt: skip
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


def run_composition(scored: Scored) -> dict[str, Any]:
    """{side, negation: share of captions preferred to their foil, n, and how many captions have none}."""
    from biomedclip.evaluation.composition import pair_credit, swap_side, turn_negation

    found: dict[str, Any] = {}
    for name, change in (("side", swap_side), ("negation", turn_negation)):
        foils = [change(str(row.text)) for row in scored.rows]
        kept = [i for i, foil in enumerate(foils) if foil is not None]
        if not kept:
            found[name] = {"reason": "no caption has anything to change", "without_foil": len(foils)}
            continue
        own = scored.embed_texts([str(scored.rows[i].text) for i in kept])
        other = scored.embed_texts([str(foils[i]) for i in kept])
        images = scored.images[kept]
        credit = pair_credit((images * own).sum(1), (images * other).sum(1))
        found[name] = {"accuracy": float(credit.mean()), "chance": 0.5, "n": len(kept),
                       "without_foil": len(foils) - len(kept)}  # fmt: skip
    return found


def _splits(scored: Scored, config: EvaluateConfig) -> tuple[Features, Selection, Features]:
    scores = _class_scores(scored)
    train, held = _features(scored, "train"), None
    if scored.task.select_split not in (None, "train"):
        held = _features(scored, str(scored.task.select_split))
    test = Features(vectors=scored.images, y=scores.y, num_classes=len(scores.classes), split=scored.task.split,
                    groups=scores.group_ids)  # fmt: skip
    if config.allow_test_selection and held is None:
        held = test
    return train, Selection(features=held, scored_split=scored.task.split, allow_test=config.allow_test_selection,
                            seed=config.seed), test  # fmt: skip


def _features(scored: Scored, split: str) -> Features:
    if split == scored.task.split:
        raise DataError(scored.task.name, f"split '{split}' is the one that is scored: nothing is learnt on it")
    manifest = scored.read_split(split)
    embedded = scored.embed(manifest)
    label = {entry.label: c for c, entry in enumerate(scored.task.classes)}
    rows = {row.sample_id: row for row in manifest.rows}
    # Near-copies of a scored image (its patient, slide or duplicate) may lie in the set's own training split.
    scored_groups = {row.group_id for row in scored.rows if row.group_id}
    places = [i for i, name in enumerate(embedded.sample_ids) if rows[name].group_id not in scored_groups]
    if not places:
        raise DataError(scored.task.name, f"every group of split '{split}' is also in the one that is scored")
    kept = [rows[embedded.sample_ids[i]] for i in places]
    groups = None
    if any(row.group_id for row in kept):
        groups = tuple(row.group_id or f"sample:{row.sample_id}" for row in kept)
    y = np.asarray([label[row.labels[0]] for row in kept], dtype=np.int64)
    return Features(vectors=embedded.vectors[places], y=y, num_classes=len(label), split=split, groups=groups)


def _fits() -> Mapping[str, Callable[..., Any]]:
    from biomedclip.evaluation.adapters import gda, linear, lpp, neighbours, tip

    return {
        "linear_probe": linear.fit_linear, "knn": neighbours.fit_neighbours, "lp++": lpp.fit_lpp,
        "nearest_mean": neighbours.fit_nearest_mean, "gda": gda.fit_gda, "tip": tip.fit_tip,
        "tip_f": tip.fit_tip_trained,
    }  # fmt: skip


def _class_scores(scored: Scored) -> ClassScores:
    if not isinstance(scored.scores, ClassScores):
        raise DataError(scored.task.name, "has no one class an image")
    return scored.scores


def _take(scores: ClassScores, rows: NDArray[np.int64]) -> ClassScores:
    from dataclasses import replace

    return replace(scores, sample_ids=tuple(scores.sample_ids[i] for i in rows), y=scores.y[rows],
                   cosines=scores.cosines[rows], group_ids=None)  # fmt: skip


def _as_json(value: Any) -> Any:
    """Numbers that are undefined become null; keys become text."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return None if not np.isfinite(value) else float(value)
    return int(value) if isinstance(value, np.integer) else value
