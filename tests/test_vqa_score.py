"""Scores of answers: against figures worked out by hand, published ones, and a slow bootstrap."""

import json
import time

import numpy as np
import pytest

from biomedclip.errors import DataError
from biomedclip.evaluation.vqa.baselines import answer_from_words, answer_majority, shuffle_images
from biomedclip.evaluation.vqa.normalise import normalise, token_scores
from biomedclip.evaluation.vqa.questions import Question, QuestionTable
from biomedclip.evaluation.vqa.score import compare_answers, read_answers, score_answers


def ask(number, answer, kind="closed", image=None, **facts):
    return Question(question_id=str(number), image=image or f"{number}.png", group=image or f"{number}.png",
                    question=facts.pop("question", "q?"), answer=answer, answer_type=kind, **facts)  # fmt: skip


def table(*rows):
    return QuestionTable(name="set", root=".", rows=tuple(rows))


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("Yes.", "yes"), ("The Left lung", "left lung"), ("two", "2"), ("None", "0"), ("x-ray", "x ray"),
        ("chest, abdomen", "chest abdomen"), ("1,000 mL", "1000 ml"), ("3.5 cm.", "3.5 cm"),
        ("dont know", "don't know"),
        ("  a   mass\n", "mass"), ("were", "were"), ("ct / mri", "ct mri"), ("肝脏。", "肝脏"),
    ],
)  # fmt: skip
def test_answers_are_normalised_as_the_vqa_challenge_does(answer, same):
    assert normalise(answer) == same
    assert normalise(same) == same


def test_token_scores_by_hand():
    assert token_scores("left upper lobe", "left lobe") == pytest.approx((2 / 3, 1, 0.8, 2 / 3))
    # One of two words said: precision 1, and the brevity penalty exp(1 - 2).
    assert token_scores("left", "left lobe") == pytest.approx((1, 0.5, 2 / 3, np.exp(-1)))
    assert token_scores("left left", "left lobe")[0] == 0.5
    assert token_scores("", "lobe") == (0, 0, 0, 0)
    assert token_scores("肝", "肝脏")[1] == 0.5


@pytest.mark.parametrize(
    ("open_right", "closed_right", "published"),
    [(120, 208, (67.0, 76.5, 72.7)), (109, 221, (60.9, 81.3, 73.2))],
    ids=["biomedclip-meter", "biomedgpt-b"],
)
def test_a_file_of_predictions_gives_a_published_figure_back(tmp_path, open_right, closed_right, published):
    """VQA-RAD's 179 open and 272 closed test questions; published to a tenth of a point."""
    rows = [ask(i, "Yes", "closed", f"{i % 203}.png") for i in range(272)]
    rows += [ask(272 + i, "the left lung", "open", f"{i}.png") for i in range(179)]
    said = ["yes." if i < closed_right else "no" for i in range(272)]
    said += ["Left lung" if i < open_right else "lung" for i in range(179)]
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps({"question_id": i, "text": text}) + "\n" for i, text in enumerate(said)))
    found = score_answers(table(*rows), read_answers(path), resamples=100)["metrics"]
    values = [100 * found[name]["value"] for name in ("accuracy/open", "accuracy/closed", "accuracy")]
    assert values == pytest.approx(published, abs=0.05)


MEVF_TYPES = {
    "COUNT": (1, 1, 2, 0), "COLOR": (0, 0, 3, 3), "ORGAN": (8, 3, 2, 2), "PRES": (30, 11, 83, 70),
    "PLANE": (11, 7, 12, 5), "MODALITY": (14, 4, 15, 10), "POS": (36, 22, 3, 1), "ABN": (9, 4, 25, 18),
    "SIZE": (3, 2, 27, 23), "OTHER": (11, 0, 9, 3), "ATTRIB": (2, 1, 7, 7),
}  # fmt: skip
"""Open questions, right open answers, closed questions, right closed answers: the tables that MEVF's released model
(BAN) printed for VQA-RAD's freeform test questions, in emmali808/BESTMVQA @ cc5a078f, MEVF/.../results/BAN_MEVF."""
MEVF_PRINTED = {
    "COUNT": 33.3, "COLOR": 100.0, "ORGAN": 50.0, "PRES": 71.7, "PLANE": 52.2, "MODALITY": 48.3, "POS": 59.0,
    "ABN": 64.7, "SIZE": 83.3, "OTHER": 15.0, "ATTRIB": 88.9,
}  # fmt: skip
MEVF_TWICE = {("open", True): 1, ("open", False): 1, ("closed", True): 3, ("closed", False): 0}
"""Questions of two types, by type and outcome: the type tables sum to that many more than the totals."""


def test_a_file_with_mevf_s_counts_gives_every_figure_it_printed(tmp_path):
    """43.9 open, 75.1 closed, 62.7 overall (Nguyen et al. 2019, table 2), and the accuracy of each content type.

    The model's single answers were not published: which question of a type was answered rightly is made up, the counts
    are not. Questions of two types are merged from two types that both have one of that outcome.
    """
    cells = []
    for kind, at in (("open", 0), ("closed", 2)):
        for right in (True, False):
            count = {t: c[at + 1] if right else c[at] - c[at + 1] for t, c in MEVF_TYPES.items()}
            merged = MEVF_TWICE[kind, right]
            for i in range(merged):
                first, second = [t for t, c in sorted(count.items(), key=lambda item: -item[1])][i : i + 2]
                cells.append((kind, right, f"{first}, {second}"))
                count[first], count[second] = count[first] - 1, count[second] - 1
            cells += [(kind, right, t) for t, c in count.items() for _ in range(c)]
    assert len(cells) == 308
    rows, said = [], []
    for i, (kind, right, types) in enumerate(cells):
        truth = "Yes" if kind == "closed" else "The left lung."
        rows.append(ask(i, truth, kind, f"{i % 203}.png", content_type=types, phrase_type="freeform"))
        said.append({"question_id": str(i), "answer": truth.lower() if right else "lung"})
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in said))
    found = score_answers(table(*rows), read_answers(path), resamples=100)
    printed = {"accuracy": 62.7, "accuracy/open": 43.9, "accuracy/closed": 75.1}
    assert {name: round(100 * found["metrics"][name]["value"], 1) for name in printed} == printed
    parts = found["parts"]["content_type"]
    assert {name: round(100 * one["value"], 1) for name, one in parts.items()} == MEVF_PRINTED
    assert {name: one["n"] for name, one in parts.items()} == {t: c[0] + c[2] for t, c in MEVF_TYPES.items()}
    assert found["parts"]["phrase_type"]["freeform"]["n"] == 308


def test_scores_by_part_ceiling_and_paraphrases_by_hand():
    rows = (
        ask(0, "yes", image="a", content_type="PRES", organ="HEAD", phrase_id="p"),
        ask(1, "yes", image="a", content_type="PRES", organ="HEAD", phrase_id="p"),
        ask(2, "yes", image="b", content_type="ABN", organ="HEAD", phrase_id="p"),
        ask(3, "liver cyst", "open", image="b", content_type="ABN", also_accepted=("cyst",)),
    )
    found = score_answers(table(*rows), {"0": "Yes", "1": "no", "3": "a cyst"}, train_answers=["YES"], resamples=200)
    assert (found["n"], found["images"], found["unanswered"]) == (4, 2, 1)
    assert found["metrics"]["accuracy"]["value"] == 0.5
    assert found["metrics"]["accuracy/closed"]["value"] == pytest.approx(1 / 3)
    assert found["metrics"]["token_f1"]["value"] == 1
    assert {name: one["value"] for name, one in found["parts"]["content_type"].items()} == {"ABN": 0.5, "PRES": 0.5}
    assert found["parts"]["organ"]["HEAD"]["n"] == 3
    assert found["unseen_answer_ceiling"] == {"overall": 0.75, "open": 0.0, "closed": 1.0}
    assert found["paraphrase_consistency"] == {"value": 0.0, "pairs": 1}
    json.dumps(found, allow_nan=False)


def test_the_interval_is_that_of_a_bootstrap_over_images():
    rng = np.random.default_rng(0)
    rows = [ask(i, "yes" if rng.random() < 0.5 else "no", image=f"{i // 4}") for i in range(200)]
    # Whole images are right or wrong: an interval over questions would be half as wide.
    right = rng.random(50) < 0.6
    said = {row.question_id: row.answer if right[int(row.group)] else "?" for row in rows}
    found = score_answers(table(*rows), said, resamples=4000)["metrics"]["accuracy"]
    means = right[rng.integers(0, 50, (4000, 50))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.02)
    assert "by image" in score_answers(table(*rows), said, resamples=100)["interval"]


def test_comparisons_are_paired_by_image_and_adjusted():
    rows = [ask(i, "yes", image=f"{i // 2}") for i in range(200)]
    good = {str(i): "yes" if i % 10 else "no" for i in range(200)}
    bad = {str(i): "yes" if i % 2 else "no" for i in range(200)}
    found = compare_answers(table(*rows), good, {"bad": bad, "itself": good}, resamples=500)
    by = {(row["against"], row["metric"]): row for row in found}
    assert by["bad", "accuracy/closed"]["difference"] == pytest.approx(0.4)
    assert by["bad", "accuracy/closed"]["low"] > 0
    assert by["itself", "accuracy"]["difference"] == 0
    assert by["bad", "accuracy"]["p_holm"] == pytest.approx(4 * by["bad", "accuracy"]["p"])


def test_a_part_that_resamples_can_miss_has_a_reason_and_no_interval():
    rows = [ask(0, "yes", content_type="RARE"), *[ask(i, "yes") for i in range(1, 20)]]
    found = score_answers(table(*rows), {}, resamples=200)["parts"]["content_type"]["RARE"]
    assert found["low"] is None
    assert "undefined on" in found["reason"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question_id": 1}\n', "needs question_id and answer"),
        ('{"question_id": 1, "answer": "a"}\n' * 2, "answers a question again"),
        ("no\n", "neither JSON nor JSON lines"),
    ],
)
def test_broken_prediction_files_are_one_line(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_answers(tmp_path / "p.jsonl")


def test_predictions_come_as_an_object_or_a_list_too(tmp_path):
    (tmp_path / "p.json").write_text('{"1": "yes"}')
    (tmp_path / "l.json").write_text('[{"qid": 1, "answer": "yes"}]')
    assert read_answers(tmp_path / "p.json") == read_answers(tmp_path / "l.json") == {"1": "yes"}
    with pytest.raises(DataError, match=r"1 questions that are not in set .*7"):
        score_answers(table(ask(1, "yes")), {"7": "yes"})


def test_the_majority_answers_by_kind_and_falls_back():
    train = table(
        *[ask(i, "no", content_type="PRES") for i in range(3)],
        *[ask(10 + i, "yes", content_type="ABN") for i in range(4)],
        ask(20, "ct", "open", content_type="MODALITY"),
    )  # fmt: skip
    scored = table(ask(0, "x", content_type="PRES"), ask(1, "x", content_type="NEW"), ask(2, "x", "open"))
    assert answer_majority(train, scored) == {"0": "no", "1": "yes", "2": "ct"}


def test_words_alone_answer_what_words_tell():
    train = table(
        *[ask(i, "ct" if i % 2 else "mri", question="bright bone" if i % 2 else "dark bone") for i in range(20)]
    )
    scored = table(ask(0, "?", question="bright bone?"), ask(1, "?", question="dark bone?"))
    assert answer_from_words(train, scored) == {"0": "ct", "1": "mri"}


def test_shuffled_images_are_never_the_question_s_own():
    images = [f"{i % 7}" for i in range(40)]
    shown = shuffle_images(images, seed=3)
    assert all(images[i] != images[j] for i, j in enumerate(shown))
    assert len({images[j] for j in shown}) == 7


@pytest.mark.slow
def test_a_hundred_thousand_answers_are_scored_in_ten_seconds():
    rng = np.random.default_rng(0)
    rows = [
        ask(i, str(rng.integers(50)), "open" if i % 3 else "closed", f"{i // 5}", organ=f"o{i % 4}")
        for i in range(100_000)
    ]
    said = {row.question_id: str(rng.integers(50)) for row in rows}
    start = time.process_time()
    score_answers(table(*rows), said)
    assert time.process_time() - start < 10
