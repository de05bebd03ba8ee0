"""What is learnt or chosen on a task's other splits, and then measured on the one that is scored.

Reads a scored task; yields plain numbers: adapters and few-shot curves, calibration and prior correction, prompts that
know how the image was made, and the points between two models. Each says on which split its choice was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from biomedclip.errors import BiomedclipError, DataError
from biomedclip.evaluation import calibration, metrics
from biomedclip.evaluation.adapters.features import Features, Logits
from biomedclip.evaluation.config import EvaluateConfig
from biomedclip.evaluation.scored import Scored, Vectors
from biomedclip.evaluation.scores import statistics_of
from biomedclip.evaluation.zero_shot import class_weights, correct_prior, score_classes


def run_adapters(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """{method: metrics on the scored split, `selection`} next to the zero-shot values."""
    from biomedclip.evaluation.adapters.few_shot import draw_shots

    rows, vectors = scored.embed_split("train")
    train, selection, test = (
        scored.as_features(rows, vectors, "train"),
        scored.selection(config),
        scored.test_features(),
    )
    text, fits = class_weights(scored.prompts), _fits(scored, config)
    table: dict[str, Any] = {}
    for name in config.adapters:
        support = train
        extra: dict[str, Any] = {}
        if name == "coop":  # a few-shot method: hundreds of images a class would be hours of a text tower's gradients
            support = train.take(draw_shots(train, config.prompt_learning.per_class, config.seed)[0])
        elif name == "caps":
            captions = [row.text or scored.sentences[row.labels[0]][0] for row in rows]
            extra = {"captions": scored.embed_texts(captions)}
        try:
            adapted = fits[name](support, selection, text=text, logit_scale=scored.logit_scale, **extra)
        except BiomedclipError as error:
            table[name] = {"reason": str(error)[:200]}
            continue
        table[name] = _measure(test, adapted.logits(test.vectors)) | {
            "n_train": len(support.y), "selection": adapted.choice.describe()
        }  # fmt: skip
    return table


def run_few_shot(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """{method: {shots: mean, sd, min, max, n}} of balanced accuracy, and which classes were short."""
    from biomedclip.evaluation.adapters.few_shot import FewShot, summarise_shots, sweep_shots

    if config.few_shot is None:
        return {}
    train, selection, test = scored.features("train"), scored.selection(config), scored.test_features()
    rows: list[FewShot] = []
    failed: dict[str, str] = {}
    fits = _fits(scored, config)
    for name in config.few_shot.methods:
        for shots in config.few_shot.shots:
            try:
                rows += sweep_shots(
                    {name: fits[name]}, train, selection, test, shots=(shots,), seeds=range(config.few_shot.seeds),
                    text=class_weights(scored.prompts), logit_scale=scored.logit_scale,
                )  # fmt: skip
            except BiomedclipError as error:
                failed[f"{name}, K = {shots}"] = str(error)[:200]
    short = sorted({scored.task.classes[c].label for row in rows for c in row.short})
    tags = ["selected_on_test"] if any(row.choice.on_test for row in rows) else []
    zero_shot = _measure(test, scored.class_scores.cosines.astype(np.float64))["balanced_accuracy"]
    return {"metric": selection.metric, "curves": summarise_shots(rows), "zero_shot": zero_shot, "short": short,
            "failed": failed, "tags": tags}  # fmt: skip


def run_calibration(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """Numbers at the model's own scale, after a temperature fitted on the selection split, and the diagram's points."""
    del config
    scores = scored.class_scores
    logits = scores.logit_scale * scores.cosines.astype(np.float64)
    shown = calibration.reliability(scores.y, metrics.softmax(logits))
    found = {
        "own_scale": calibration.calibrate(scores.y, logits),
        "reliability": {k: getattr(shown, k).tolist() for k in ("confidence", "accuracy", "count")},
    }
    if scored.task.select_split is None:
        return found | {"temperature": {"reason": "the task has no split to fit a temperature on"}}
    try:
        held = scored.features(scored.task.select_split)
    except DataError as error:
        return found | {"temperature": {"reason": str(error)[:200]}}
    of, held_logits = {"split": held.split, "n": len(held.y)}, scored.logit_scale * _cosines(scored, held.vectors)
    if (held_logits.argmax(1) == held.y).all():
        # The likelihood then grows without end as the temperature falls: what the search ends with says nothing.
        return found | {"temperature": {"reason": f"all {len(held.y)} samples of {held.split} are right", **of}}
    temperature = calibration.fit_temperature(held.y, held_logits)
    return found | {"temperature": {"value": temperature, **of, **calibration.calibrate(scores.y, logits, temperature)}}


def run_prior(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """Metrics before and after the model's own fondness for classes is taken out, `tau` 1.

    How common the model takes each class to be is its mean probability on the images of the selection split; their
    labels are not looked at. Raises DataError without that split.
    """
    del config
    if scored.task.select_split is None:
        raise DataError(scored.task.name, "has no split to see the model's prior on")
    held, test, scores = scored.features(scored.task.select_split), scored.test_features(), scored.class_scores
    shares = metrics.softmax(scored.logit_scale * _cosines(scored, held.vectors).astype(np.float64)).mean(0)
    corrected = correct_prior(scores.cosines, shares, scored.logit_scale)
    return {
        "before": _measure(test, scores.cosines.astype(np.float64)),
        "after": _measure(test, corrected.astype(np.float64)),
        "shares": dict(zip(scores.classes, shares.tolist(), strict=True)), "split": held.split, "n": len(held.y),
        "tau": 1.0,
    }  # fmt: skip


def run_perception(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """Metrics of PerceptionCLIP with the config's attribute values, zero-shot beside it, and what was perceived."""
    from biomedclip.evaluation.adapters.perception import infer_attributes, perceive

    asked, test = config.perception[scored.task.name], scored.test_features()
    prompts = np.stack([
        class_weights([scored.embed_texts([asked.joined(s, value) for s in sentences])
                       for sentences in scored.sentences.values()])
        for value in asked.values
    ])  # fmt: skip
    alone = None
    if asked.infer == "pure":
        alone = scored.embed_texts([asked.alone.replace("{}", value) for value in asked.values])
    facts: dict[str, Any] = {"logit_scale": scored.logit_scale, "temperature": asked.temperature}
    adapted = perceive(prompts, attributes=alone, infer=asked.infer, **facts)
    shares = infer_attributes(scored.images, prompts, attributes=alone, **facts)
    return {
        **_measure(test, adapted.logits(scored.images)),
        "zero_shot": _measure(test, scored.class_scores.cosines.astype(np.float64)),
        "perceived": dict(zip(asked.values, shares.mean(0).tolist(), strict=True)), "infer": asked.infer,
        "temperature": asked.temperature,
    }  # fmt: skip


def run_wise(scored: Scored, config: EvaluateConfig) -> dict[str, Any]:
    """The primary metric at each point between the start's weights (0) and the model's (1), and the point that the
    selection split would choose: the nearest to the start of equals."""
    from biomedclip.evaluation.adapters.wise import choose_point, sweep_weights
    from biomedclip.models.interpolate import carrying, interpolate

    if config.wise is None:
        return {}
    metric, model = scored.task.metrics.primary, scored.encoder.model
    start, end = scored.start_weights(), {k: v.detach().clone() for k, v in model.state_dict().items()}
    manifests = {scored.task.split: scored.manifest}
    chosen_on = scored.task.select_split
    if chosen_on is not None and scored.has_split(chosen_on):
        manifests[chosen_on] = scored.read_split(chosen_on)

    def evaluate() -> dict[str, float]:
        values = {}
        for split, manifest in manifests.items():
            embedded = scored.embed(manifest, fresh=True)
            readable = set(embedded.sample_ids)
            rows = [row for row in manifest.rows if row.sample_id in readable]
            values[split] = float(statistics_of(scored.score(rows, embedded.vectors), (metric,))[metric](None))
        return values

    curve = list(sweep_weights(lambda alpha: carrying(model, interpolate(start, end, alpha)), evaluate,
                               config.wise.alphas))  # fmt: skip
    found: dict[str, Any] = {"metric": metric, "start": config.wise.start,
                             "curve": [{"alpha": alpha, **values} for alpha, values in curve]}  # fmt: skip
    if chosen_on is None or chosen_on not in manifests:
        return found | {"chosen": {"reason": "there is no split to choose a point on"}}
    choice = choose_point(curve, chosen_on, split=chosen_on, scored_split=scored.task.split)
    alpha = choice.hparams["alpha"]
    return found | {"chosen": {**choice.describe(), "value": dict(curve)[alpha][scored.task.split]}}


def _measure(test: Features, logits: Logits) -> dict[str, Any]:
    predicted = logits.argmax(1)
    return {
        "balanced_accuracy": float(metrics.balanced_accuracy(metrics.confusion(test.y, predicted, test.num_classes))),
        "accuracy": float(metrics.accuracy(test.y, predicted)),
        "auroc": float(metrics.macro_auroc(test.y, logits)), "n": len(test.y),
    }  # fmt: skip


def _cosines(scored: Scored, vectors: Vectors) -> Vectors:
    return score_classes(vectors, scored.prompts, scored.task.ensemble, scored.logit_scale)


def _fits(scored: Scored, config: EvaluateConfig) -> Mapping[str, Callable[..., Any]]:
    from biomedclip.evaluation.adapters import caps, gda, linear, lpp, neighbours, prompt_learning, tip

    asked, encoder = config.prompt_learning, scored.encoder
    learn: dict[str, Any] = {
        "model": encoder.model, "tokenizer": encoder.tokenizer, "device": encoder.device, "context": asked.context,
        "epochs": asked.epochs, "learning_rate": asked.learning_rate, "batch_size": asked.batch_size,
        "class_names": [entry.name for entry in scored.task.classes],
    }  # fmt: skip
    return {
        "linear_probe": linear.fit_linear, "knn": neighbours.fit_neighbours, "lp++": lpp.fit_lpp,
        "nearest_mean": neighbours.fit_nearest_mean, "gda": gda.fit_gda, "tip": tip.fit_tip,
        "tip_f": tip.fit_tip_trained, "caps": caps.fit_caps, "coop": partial(prompt_learning.fit_prompts, **learn),
        "upl": partial(prompt_learning.fit_pseudo_labels, per_class=asked.per_class, **learn),
    }  # fmt: skip
