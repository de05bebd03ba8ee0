"""Adapters against independent implementations, closed forms and their limits; choices only where they may be made."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation.adapters.caps import fit_caps
from biomedclip.evaluation.adapters.features import Features, Selection, score_logits, split_folds, zero_shot_logits
from biomedclip.evaluation.adapters.few_shot import draw_shots, summarise_shots, sweep_shots
from biomedclip.evaluation.adapters.gda import discriminant, fit_gda, shrink
from biomedclip.evaluation.adapters.linear import conch_strength, fit_linear
from biomedclip.evaluation.adapters.lpp import descend, fit_lpp
from biomedclip.evaluation.adapters.neighbours import fit_nearest_mean, fit_neighbours
from biomedclip.evaluation.adapters.perception import infer_attributes, perceive
from biomedclip.evaluation.adapters.prompt_learning import pseudo_label
from biomedclip.evaluation.adapters.tip import fit_tip, fit_tip_trained, train_keys
from biomedclip.evaluation.metrics import softmax

C, D = 3, 12


def unit(values):
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def make(n, split, seed, noise=0.6, groups=None):
    rng = np.random.default_rng(seed)
    centres = unit(np.random.default_rng(99).normal(size=(C, D)))
    y = rng.permutation(np.arange(n) % C)
    return Features(vectors=unit(centres[y] + noise * rng.normal(size=(n, D)) / np.sqrt(D) * 2), y=y, num_classes=C,
                    split=split, groups=groups)  # fmt: skip


TRAIN, VAL, TEST = make(60, "train", 0), make(45, "val", 1), make(90, "test", 2)
# Text weights that are right in the main and far from perfect.
TEXT = unit(np.random.default_rng(99).normal(size=(C, D)) + 0.9 * np.random.default_rng(5).normal(size=(C, D)))
ON_VAL = Selection(features=VAL)


def test_pitfall_18_choosing_on_the_scored_split_is_refused_and_tagged_where_allowed():
    with pytest.raises(ConfigError, match="would choose hyper-parameters on the split that is scored"):
        Selection(features=TEST)
    allowed = fit_gda(TRAIN, Selection(features=TEST, allow_test=True), text=TEXT)
    assert allowed.choice.describe()["tags"] == ["selected_on_test"]
    assert "tags" not in fit_gda(TRAIN, ON_VAL, text=TEXT).choice.describe()


@pytest.mark.parametrize("fit", [fit_linear, fit_neighbours, fit_gda, fit_tip, fit_tip_trained, fit_lpp])
def test_every_adapter_says_what_it_chose_and_chose_the_best_of_its_table(fit):
    adapted = fit(TRAIN, ON_VAL, text=TEXT, logit_scale=30.0)
    choice = adapted.choice
    assert choice.split == "val"
    assert choice.score == max(value for _, value in choice.table)
    assert (dict(choice.hparams), choice.score) in [(dict(p), v) for p, v in choice.table]
    assert score_logits(VAL.y, adapted.logits(VAL.vectors), "balanced_accuracy") == pytest.approx(choice.score)
    # What was learnt helps on samples nobody looked at.
    zero = score_logits(TEST.y, zero_shot_logits(TEST.vectors, TEXT, 30), "balanced_accuracy")
    assert score_logits(TEST.y, adapted.logits(TEST.vectors), "balanced_accuracy") >= zero - 0.02


def test_without_a_validation_split_folds_keep_groups_on_one_side():
    groups = tuple(f"p{i // 4}" for i in range(60))
    grouped = make(60, "train", 0, groups=groups)
    for train, held_out in split_folds(grouped, 5, 0):
        assert not {groups[i] for i in train} & {groups[i] for i in held_out}
        assert len(train) + len(held_out) == 60
    choice = fit_gda(grouped, Selection(), text=TEXT).choice
    assert choice.split == "folds of train"
    with pytest.raises(DataError, match="too few samples or groups"):
        fit_gda(TRAIN.take(draw_shots(TRAIN, 1, 0)[0]), Selection(), text=TEXT)


def test_the_linear_probe_is_the_optimum_scipy_finds():
    adapted = fit_linear(TRAIN, ON_VAL, grid=(10.0,), max_iter=5000)
    x, target = TRAIN.vectors.astype(float), TRAIN.one_hot()

    def loss(flat):
        w, b = flat[: C * D].reshape(C, D), flat[C * D :]
        p = softmax(x @ w.T + b)
        error = p - target
        value = -np.log(p[np.arange(60), TRAIN.y]).sum() + (w**2).sum() / 20
        return value, np.r_[(error.T @ x + w / 10).ravel(), error.sum(0)]

    best = minimize(loss, np.zeros(C * D + C), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-14})
    w, b = best.x[: C * D].reshape(C, D), best.x[C * D :]
    expected = softmax(TEST.vectors @ w.T + b)
    assert softmax(adapted.logits(TEST.vectors)) == pytest.approx(expected, abs=5e-3)
    assert conch_strength(512, 9) == 512 * 9 / 100


def test_a_class_the_probe_never_saw_has_no_chance_and_one_class_is_refused():
    part = TRAIN.take(np.flatnonzero(TRAIN.y != 1))
    logits = fit_linear(part, ON_VAL, grid=(1.0,)).logits(TEST.vectors)
    assert (logits[:, 1] == -np.inf).all()
    assert np.isfinite(logits[:, [0, 2]]).all()
    with pytest.raises(DataError, match="one class"):
        fit_linear(TRAIN.take(np.flatnonzero(TRAIN.y == 1)), ON_VAL)


@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_vote_as_scikit_learns_do(k):
    ours = fit_neighbours(TRAIN, ON_VAL, grid=(k,)).logits(TEST.vectors)
    theirs = KNeighborsClassifier(k, metric="cosine").fit(TRAIN.vectors, TRAIN.y).predict_proba(TEST.vectors)
    assert np.exp(ours) == pytest.approx(theirs, abs=2e-6)
    weighted = fit_neighbours(TRAIN, ON_VAL, grid=(k,), temperature=0.07).predict(TEST.vectors)
    w = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp(-d / 0.07)).fit(TRAIN.vectors, TRAIN.y)
    assert (weighted == w.predict(TEST.vectors)).all()


def test_the_nearest_mean_is_scikit_learns_on_centred_embeddings():
    adapted = fit_nearest_mean(TRAIN)
    middle = TRAIN.vectors.mean(0)
    moved = [unit(f.vectors - middle) for f in (TRAIN, TEST)]
    assert (adapted.predict(TEST.vectors) == NearestCentroid().fit(moved[0], TRAIN.y).predict(moved[1])).all()


def test_gda_is_bayes_rule_for_gaussians_of_one_covariance():
    weights, bias = discriminant(TRAIN)
    means = TRAIN.class_means()
    covariance = np.cov((TRAIN.vectors - means[TRAIN.y]).T, ddof=1)
    # The ridge the paper takes for the covariance; densities by scipy.
    model = shrink(covariance, 60)
    assert model == pytest.approx((59 * covariance + np.trace(covariance) * np.eye(D)) / D)
    densities = np.stack([multivariate_normal(m, model).logpdf(TEST.vectors) for m in means], axis=1)
    assert softmax(TEST.vectors @ weights.T + bias) == pytest.approx(softmax(densities), abs=1e-3)


def test_gda_mixes_and_its_limits_are_its_parts():
    zero = fit_gda(TRAIN, ON_VAL, text=TEXT, grid=(0.0,)).logits(TEST.vectors)
    assert zero == pytest.approx(zero_shot_logits(TEST.vectors, TEXT, 100))
    weights, bias = discriminant(TRAIN)
    far = fit_gda(TRAIN, ON_VAL, text=TEXT, grid=(1e9,)).predict(TEST.vectors)
    assert (far == (TEST.vectors @ weights.T + bias).argmax(1)).all()
    one = TRAIN.take(draw_shots(TRAIN, 1, 0)[0])
    nearest = ((TEST.vectors[:, None] - one.class_means()) ** 2).sum(2).argmin(1)
    assert (fit_gda(one, ON_VAL, text=TEXT, grid=(1e9,)).predict(TEST.vectors) == nearest).all()


def test_tip_is_its_formula_and_without_the_cache_zero_shot():
    adapted = fit_tip(TRAIN, ON_VAL, text=TEXT, alphas=(2.0,), betas=(3.5,), logit_scale=20)
    for i in range(5):
        f = TEST.vectors[i].astype(float)
        cache = sum(np.exp(-3.5 * (1 - f @ k)) * np.eye(C)[c] for k, c in zip(TRAIN.vectors, TRAIN.y, strict=True))
        assert adapted.logits(TEST.vectors)[i] == pytest.approx(20 * TEXT @ f + 2 * cache, rel=1e-4)
    off = fit_tip(TRAIN, ON_VAL, text=TEXT, alphas=(0.0,), betas=(1.0,))
    assert off.logits(TEST.vectors) == pytest.approx(zero_shot_logits(TEST.vectors, TEXT, 100))


def test_trained_keys_start_as_the_support_and_lower_the_loss():
    states = list(train_keys(TRAIN, TEXT, 20.0, 15, 32, 1e-2, 1.0, 5.5, 0))
    assert (states[0] == TRAIN.vectors).all()
    assert len(states) == 16

    def loss(keys):
        votes = np.exp(-5.5 * (1 - TRAIN.vectors @ keys.T)) @ TRAIN.one_hot()
        p = softmax(zero_shot_logits(TRAIN.vectors, TEXT, 20) + votes)
        return -np.log(p[np.arange(60), TRAIN.y]).mean()

    assert loss(states[-1]) < loss(states[0])
    again = list(train_keys(TRAIN, TEXT, 20.0, 15, 32, 1e-2, 1.0, 5.5, 0))
    assert (again[-1] == states[-1]).all()


def test_caps_without_captions_and_likeness_is_tip_and_an_image_does_not_depend_on_the_others():
    captions = unit(TEXT[TRAIN.y] + 0.3 * np.random.default_rng(1).normal(size=(60, D)))
    facts = dict(text=TEXT, captions=captions, logit_scale=20)
    plain = fit_caps(TRAIN, ON_VAL, grid=((2.0,), (3.5,), (0.0,), (0.0,)), **facts)
    tip = fit_tip(TRAIN, ON_VAL, text=TEXT, alphas=(2.0,), betas=(3.5,), logit_scale=20)
    assert plain.logits(TEST.vectors) == pytest.approx(tip.logits(TEST.vectors), rel=1e-4)
    whole = fit_caps(TRAIN, ON_VAL, **facts)
    assert whole.logits(TEST.vectors)[:1] == pytest.approx(whole.logits(TEST.vectors[:1]), rel=1e-9)
    with pytest.raises(ConfigError, match="needs a validation split"):
        fit_caps(TRAIN, Selection(), **facts)
    with pytest.raises(DataError, match="one for each"):
        fit_caps(TRAIN, ON_VAL, **(facts | {"captions": captions[:3]}))


def test_caps_likeness_is_the_kl_divergence_of_class_probabilities():
    from scipy.stats import entropy

    captions = TRAIN.vectors
    gamma = fit_caps(TRAIN, ON_VAL, text=TEXT, captions=captions, logit_scale=20, grid=((0.0,), (3.5,), (1.0,), (0.0,)))
    base = zero_shot_logits(TEST.vectors, TEXT, 20)
    ours = gamma.logits(TEST.vectors) - base
    p = [softmax(zero_shot_logits(f.vectors, TEXT, 20)) for f in (TEST, TRAIN)]
    near, inner = (-entropy(a[:, None], p[1][None], axis=2) for a in p)
    range_of = np.exp(-3.5 * (1 - TRAIN.vectors.astype(float) @ TRAIN.vectors.T.astype(float)))
    share = np.clip((near - inner.min()) / (inner.max() - inner.min()), 0, 1)
    expected = (range_of.min() + share * (range_of.max() - range_of.min())) @ TRAIN.one_hot()
    assert ours == pytest.approx(expected, rel=1e-5)


def test_lpp_never_raises_its_loss_and_ends_at_the_convex_optimum():
    def loss_of(weights):
        p = softmax(TRAIN.vectors.astype(float) @ weights.T)
        return -np.log(p[np.arange(60), TRAIN.y]).mean()

    losses = [loss_of(weights) for _, weights in descend(TRAIN, TEXT, 10.0, tuple(range(200)))]
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(losses))
    start = next(w for _, w in descend(TRAIN, TEXT, 10.0, (0,)))
    assert start == pytest.approx(TRAIN.class_means() + 10 * TEXT, rel=1e-5)
    # v alone can express every linear classifier, so the optimum is that of the unpenalised probe.
    x, target = TRAIN.vectors.astype(float), TRAIN.one_hot()

    def plain(flat):
        p = softmax(x @ flat.reshape(C, D).T)
        return -np.log(p[np.arange(60), TRAIN.y]).mean(), ((p - target).T @ x / 60).ravel()

    best = minimize(plain, np.zeros(C * D), jac=True, method="L-BFGS-B").fun
    assert best - 1e-9 <= losses[-1] < losses[0]


def test_perception_sums_over_attributes_and_one_attribute_is_zero_shot():
    rng = np.random.default_rng(3)
    prompts = unit(rng.normal(size=(2, C, D)))
    found = np.exp(perceive(prompts, logit_scale=10, temperature=2).logits(TEST.vectors))
    for i in range(4):
        f = TEST.vectors[i].astype(float)
        seen = np.asarray([np.exp(10 / 2 * prompts[z] @ f).sum() for z in range(2)])
        seen /= seen.sum()
        expected = sum(seen[z] * softmax((10 * prompts[z] @ f)[None])[0] for z in range(2))
        assert found[i] == pytest.approx(expected, rel=1e-6)
    single = perceive(prompts[:1], logit_scale=10).predict(TEST.vectors)
    assert (single == (TEST.vectors @ prompts[0].T).argmax(1)).all()
    attributes = unit(rng.normal(size=(2, D)))
    shares = infer_attributes(TEST.vectors, prompts, attributes=attributes, logit_scale=10, temperature=2)
    assert shares == pytest.approx(softmax(5 * TEST.vectors @ attributes.T), abs=1e-6)
    with pytest.raises(ConfigError, match="needs prompts of the attributes"):
        perceive(prompts, infer="pure")


def test_pitfall_26_short_classes_give_what_they_have_and_say_so():
    rows = np.r_[np.flatnonzero(TRAIN.y == 0), np.flatnonzero(TRAIN.y == 1), np.flatnonzero(TRAIN.y == 2)[:3]]
    rare = TRAIN.take(rows)
    drawn, short = draw_shots(rare, 8, 0)
    assert np.bincount(rare.y[drawn]).tolist() == [8, 8, 3]
    assert short == {2: 3}
    assert set(draw_shots(rare, 4, 0)[0]) <= set(drawn)  # nested
    assert set(draw_shots(rare, 8, 1)[0]) != set(drawn)


def test_shots_come_from_different_groups_while_there_are_some():
    groups = tuple(f"p{i % 5}" for i in range(60))
    features = make(60, "train", 0, groups=groups)
    drawn, _ = draw_shots(features, 4, 3)
    for c in range(C):
        assert len({groups[i] for i in drawn if features.y[i] == c}) == 4


def test_a_curve_has_a_row_for_every_method_shot_and_seed_and_thin_validation():
    rows = list(sweep_shots({"gda": fit_gda, "tip": fit_tip, "mean": fit_nearest_mean}, TRAIN, ON_VAL, TEST,
                            shots=(1, 8), seeds=(0, 1, 2), text=TEXT, logit_scale=20.0))  # fmt: skip
    assert len(rows) == 18
    table = summarise_shots(rows)
    assert table["gda"][8]["n"] == 3
    assert table["mean"][8]["mean"] > table["mean"][1]["mean"]
    values = [row.value for row in rows if (row.method, row.shots) == ("gda", 8)]
    assert table["gda"][8]["sd"] == pytest.approx(np.std(values, ddof=1))
    assert all(row.choice.split in ("val", None) for row in rows)


def test_pseudo_labels_are_the_most_confident_of_each_predicted_class():
    logits = np.array([[3.0, 0], [1, 0], [2, 0], [0, 1], [0, 5]])
    rows, labels = pseudo_label(logits, 2)
    assert rows.tolist() == [0, 2, 4, 3]
    assert labels.tolist() == [0, 0, 1, 1]


def test_features_that_cannot_be_right_are_refused():
    with pytest.raises(DataError, match="not finite"):
        Features(vectors=np.full((2, 3), np.nan, np.float32), y=np.zeros(2, int), num_classes=1, split="train")
    with pytest.raises(DataError, match="other numbers"):
        Features(vectors=np.ones((2, 3), np.float32), y=np.zeros(3, int), num_classes=1, split="train")
    with pytest.raises(DataError, match="below 2"):
        Features(vectors=np.ones((2, 3), np.float32), y=np.array([0, 2]), num_classes=2, split="train")
    with pytest.raises(DataError, match="no sample to learn from"):
        fit_gda(TRAIN.take(np.flatnonzero(TRAIN.y != 1)), ON_VAL, text=TEXT)
