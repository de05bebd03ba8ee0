"""Answers by ranking: the sentences, the candidates, and a model whose cosines are known."""

import pytest
import torch
from PIL import Image

from biomedclip.errors import DataError
from biomedclip.evaluation.vqa.questions import Question, QuestionTable
from biomedclip.evaluation.vqa.rank import candidates_of, rank_answers
from biomedclip.evaluation.vqa.statements import asks_yes_no, declare, offered


@pytest.mark.parametrize(
    ("question", "statement", "negation"),
    [
        ("Is there a mass?", "there is a mass", "there is no mass"),
        ("Are there any fractures?", "there are fractures", "there are no fractures"),
        ("Is this a CT?", "this is a CT", "this is not a CT"),
        ("Is the heart enlarged?", "the heart is enlarged", "the heart is not enlarged"),
        ("Does the patient have edema?", "the patient does have edema", "the patient does not have edema"),
        ("Is the apex of the heart normal?", "the apex of the heart is normal", "the apex of the heart is not normal"),
        ("Is pneumonia seen?", "Is pneumonia seen? yes", "Is pneumonia seen? no"),
    ],
)
def test_a_question_becomes_a_statement_and_its_negation(question, statement, negation):
    assert declare(question) == (statement, negation)


def test_yes_no_is_told_from_the_question_and_choices_from_its_end():
    assert asks_yes_no("Is there a mass?")
    assert not asks_yes_no("Where is the mass?")
    assert not asks_yes_no("Is the mass on the left or right?")
    assert offered("Is the mass on the left or the right?") == ("left", "right")
    assert offered("Is it MRI or CT?") == ("mri", "ct")
    assert offered("What is this?") is None


class Colours(torch.nn.Module):
    """Pictures and texts by their colour: red is the first axis, blue the second."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def encode_image(self, image, normalize=False):
        return torch.nn.functional.normalize(image.mean((2, 3))[:, [0, 2]], dim=-1)

    def encode_text(self, text, normalize=False):
        return torch.nn.functional.normalize(text.float(), dim=-1)


def preprocess(picture):
    red, _, blue = picture.getpixel((0, 0))
    return torch.tensor([red, 0.0, blue]).reshape(3, 1, 1) / 255


def tokenizer(texts):
    texts = [text.rsplit("?", 1)[-1] for text in texts]
    said = [(1.0 * ("red" in t and "no red" not in t) + 0.1, 1.0 * ("blue" in t or "no red" in t) + 0.1) for t in texts]
    return torch.tensor(said)


def ask(number, question, answer, image, **facts):
    return Question(question_id=str(number), image=image, group=image, question=question, answer=answer,
                    answer_type="open", **facts)  # fmt: skip


def test_the_nearest_candidate_is_the_answer_and_another_image_another_one(tmp_path):
    for name, colour in (("r.png", (255, 0, 0)), ("b.png", (0, 0, 255))):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    rows = [
        ask(0, "Is there red?", "yes", "r.png"), ask(1, "Is there red?", "no", "b.png"),
        ask(2, "Which?", "blue", "b.png", options=("red", "blue")), ask(3, "What colour?", "red", "r.png"),
        ask(4, "Is it red or blue?", "red", "r.png"),
    ]  # fmt: skip
    table = QuestionTable(name="colours", root=str(tmp_path), rows=tuple(rows))
    answers, shuffled = rank_answers(table, ["Blue", "red", "yes"], Colours(), preprocess, tokenizer)
    assert answers == {row.question_id: row.answer for row in rows}
    assert shuffled == {"0": "no", "1": "yes", "2": "red", "3": "blue", "4": "blue"}
    with pytest.raises(DataError, match="no training answer to rank"):
        rank_answers(table, [], Colours(), preprocess, tokenizer)


def test_the_truth_is_not_looked_at():
    one, other = (ask(0, "Where is it?", answer, "a", modality="CT") for answer in ("yes", "liver"))
    assert candidates_of(one, ["lung", "liver"]) == candidates_of(other, ["lung", "liver"])
