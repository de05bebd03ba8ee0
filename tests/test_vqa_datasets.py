"""Every published layout of questions about images, made up in small, to the one table."""

import io
import json
import pickle

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation.vqa.datasets import LAYOUTS, read_questions
from biomedclip.evaluation.vqa.questions import assemble, check_language, read_picture


def picture(path, colour=(200, 10, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def rad_row(qid, **changes):
    row = {
        "qid": qid, "image_name": "a.jpg", "image_organ": "CHEST", "answer": "Yes", "answer_type": "CLOSED",
        "question_type": "PRES", "question": "Is there a mass?", "phrase_type": "freeform",
    }  # fmt: skip
    return row | changes


def write_rad_public(root):
    for name in "ab":
        picture(root / "VQA_RAD Image Folder" / f"{name}.jpg")
    rows = [
        rad_row("1", qid_linked_id="x"), rad_row("2", qid_linked_id="x", phrase_type="test_para"),
        rad_row("3", answer=12, answer_type="OPEN ", question_type="ATRIB, PRSE"),
        rad_row("3", answer="again"), rad_row("4", image_name=""), rad_row("5", image_name="gone.jpg"),
        rad_row("6", question=" "), rad_row("7", answer=None), rad_row("8", answer_type="CLOSED "),
    ]  # fmt: skip
    (root / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows))


def write_rad_mevf(root):
    picture(root / "images" / "a.jpg")
    (root / "trainset.json").write_text(json.dumps([rad_row(1), rad_row(2, answer=3, answer_type="OPEN")]))
    (root / "testset.json").write_text(json.dumps([rad_row(1, phrase_type="para")]))


def write_slake(root):
    picture(root / "imgs" / "xmlab1" / "source.jpg")
    picture(root / "imgs" / "xmlab1" / "mask.png")
    row = {
        "img_id": 1, "img_name": "xmlab1/source.jpg", "question": "What organ?", "answer": "Liver", "q_lang": "en",
        "location": "Abdomen", "modality": "CT", "answer_type": "OPEN", "base_type": "vqa", "content_type": "Organ",
        "triple": ["vhead", "_", "_"], "qid": 0,
    }  # fmt: skip
    chinese = row | {"qid": 1, "q_lang": "zh", "question": "图像中是什么器官?", "answer": "肝脏"}
    for name in ("train", "validate", "test"):
        (root / f"{name}.json").write_text(json.dumps([row, chinese]), encoding="utf-8")


def write_path_vqa(root):
    for name in ("train", "val", "test"):
        picture(root / "images" / name / "i_1.jpg")
        (root / "qas" / name).mkdir(parents=True)
        rows = [
            {"image": "i_1", "question": "is there necrosis?", "answer": "yes"},
            {"image": "i_1", "question": "where is it?", "answer": "in the liver"},
        ]
        (root / "qas" / name / f"{name}_qa.pkl").write_bytes(pickle.dumps(rows, protocol=2))


def write_vqa_med(root):
    picture(root / "train" / "Train_images" / "synpic1.jpg")
    picture(root / "test" / "images" / "synpic2.jpg")
    (root / "train" / "All_QA_Pairs_train.txt").write_text("synpic1|what modality is used?|ct#ct with contrast\n")
    (root / "test" / "VQAMed2019_Test_Questions_w_Ref_Answers.txt").write_text("synpic2|plane|in what plane?|axial\n")


def write_vqa_med_2021(root):
    picture(root / "test" / "synpic3.jpg")
    (root / "test" / "Task1-VQA-2021-TestSet-Questions.txt").write_text("synpic3|what is abnormal?\nsynpic3x|and?\n")
    (root / "test" / "Task1-2021-VQA-TestSet-ReferenceAnswers.txt").write_text("synpic3|cyst|a cyst\n")


def write_pmc_vqa(root):
    """After the set's card: answer without its letter in `Anwser`, choices with theirs, the letter in Answer_label."""
    picture(root / "images" / "PMC1_F1.jpg")
    (root / "test.csv").write_text(
        "Figure_path,Caption,Question,Choice A ,Choice B ,Choice C ,Choice D ,Anwser,Answer_label\n"
        "PMC1_F1.jpg,c,What is shown?, A:Liver , B:Lung ,C:Brain,D:Bone, Lung ,B\n"
        "PMC1_F1.jpg,c,What is not?, A:Liver , B:Lung ,C:Brain,D:Bone, Skin ,E\n"
    )


def write_omnimed(root):
    picture(root / "Images" / "x" / "1.png")
    row = {
        "dataset": "Chest", "question_id": "Chest_0001", "question_type": "Modality Recognition",
        "question": "Which modality?", "gt_answer": "CT", "image_path": "Images/x/1.png", "option_A": "CT",
        "option_B": "MR", "modality_type": "CT(Computed Tomography)",
    }  # fmt: skip
    (root / "Chest.json").write_text(json.dumps([row]))


def write_huggingface(root):
    rows = [("is it red?", "yes", png((255, 0, 0))), ("what?", "red", png((255, 0, 0))), ("what?", "b", png((0, 0, 9)))]
    table = pa.table({
        "image": [{"bytes": data, "path": None} for *_, data in rows],
        "question": [q for q, *_ in rows], "answer": [a for _, a, _ in rows],
    })  # fmt: skip
    parquet.write_table(table, root / "train-00000-of-00001.parquet", row_group_size=2)


def write_jsonl(root):
    picture(root / "pictures" / "a.png")
    rows = [
        {"id": "q1", "image": "pictures/a.png", "question": "Which?", "answer": "b", "options": ["a", "b"]},
        {"image": "pictures/a.png", "question": "How many?", "answer": 2.0, "split": "test", "phrase_id": 7},
    ]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


WRITERS = {
    "vqa_rad": write_rad_public, "vqa_rad_mevf": write_rad_mevf, "slake": write_slake, "path_vqa": write_path_vqa,
    "vqa_med": write_vqa_med, "pmc_vqa": write_pmc_vqa, "omnimed_vqa": write_omnimed,
    "huggingface": write_huggingface, "jsonl": write_jsonl,
}  # fmt: skip


def table_of(tmp_path, layout, **options):
    WRITERS[layout](tmp_path)
    return read_questions(tmp_path, layout, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_complete_rows_with_pictures(tmp_path, layout):
    table = table_of(tmp_path, layout)
    assert len({row.question_id for row in table.rows}) == len(table.rows) > 0
    for row in table.rows:
        assert all((row.question, row.answer, row.group, row.split))
        assert row.answer_type in ("open", "closed")
    manifest = table.manifest()
    assert all(read_picture(manifest, row).size == (8, 8) for row in manifest.rows)


def test_every_bad_row_is_counted_and_every_repair_too(tmp_path):
    table = table_of(tmp_path, "vqa_rad")
    assert table.dropped == {"duplicate_id": 1, "image_missing": 1, "no_answer": 1, "no_image": 1, "no_question": 1}
    assert len(table.rows) + len(table.drops) == 9
    assert table.notes == {"type_trimmed": 2, "numeric_answer": 1, "images_without_questions": 1}
    numeric = next(row for row in table.rows if row.question_id == "3")
    assert (numeric.answer, numeric.answer_type, numeric.content_type) == ("12", "open", "ATTRIB, PRES")
    assert [row.split for row in table.rows if row.phrase_id == "x"] == ["train", "test"]


def test_types_are_flagged_where_they_are_inferred(tmp_path):
    table = table_of(tmp_path, "path_vqa")
    assert {(row.answer, row.answer_type) for row in table.rows} == {("yes", "closed"), ("in the liver", "open")}
    assert all(row.type_inferred for row in table.rows)
    assert table.notes["answer_type_inferred"] == len(table.rows) == 6
    assert {row.content_type for row in table.rows} == {"yes/no", "where"}


def test_slake_is_read_by_language(tmp_path):
    assert len(table_of(tmp_path, "slake").rows) == 6
    english = read_questions(tmp_path, "slake", language="en")
    assert {row.language for row in english.rows} == {"en"}
    assert {row.split for row in english.rows} == {"train", "validation", "test"}
    assert english.rows[0].organ == "Abdomen"


def test_vqa_med_knows_alternatives_categories_and_separate_answers(tmp_path):
    (tmp_path / "a").mkdir()
    rows = {row.split: row for row in table_of(tmp_path / "a", "vqa_med").rows}
    assert (rows["train"].answer, rows["train"].also_accepted) == ("ct", ("ct with contrast",))
    assert (rows["test"].content_type, rows["test"].question) == ("plane", "in what plane?")
    write_vqa_med_2021(tmp_path / "b")
    table = read_questions(tmp_path / "b", "vqa_med")
    assert (table.rows[0].answer, table.rows[0].also_accepted) == ("cyst", ("a cyst",))
    assert table.dropped == {"no_answer": 1}


def test_options_lose_their_letters_and_an_answer_must_be_one(tmp_path):
    table = table_of(tmp_path, "pmc_vqa")
    assert table.rows[0].options == ("Liver", "Lung", "Brain", "Bone")
    assert table.rows[0].answer == "Lung"
    assert table.dropped == {"answer_not_an_option": 1}


@pytest.mark.parametrize(
    ("columns", "cells"),
    [
        ("Anwser", " B:Lung "),
        ("Answer", " Lung "),
        ("Answer", "B"),
        ("Anwser,Anwser_label", "Lung,B"),
    ],
)
def test_pmc_vqa_s_answer_is_found_in_each_of_its_spellings(tmp_path, columns, cells):
    picture(tmp_path / "images_2" / "figures" / "PMC1_F1.jpg")
    (tmp_path / "test_2.csv").write_text(
        f"index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,{columns}\n"
        f"0,PMC1_F1.jpg,c,What is shown?, A:Liver , B:Lung , C:Brain , D:Bone ,{cells}\n"
    )
    (row,) = read_questions(tmp_path, "pmc_vqa").rows
    assert (row.answer, row.split, row.answer_type) == ("Lung", "test", "closed")


def test_pmc_vqa_s_repeated_test_set_is_a_split_of_its_own(tmp_path):
    write_pmc_vqa(tmp_path)
    (tmp_path / "test_clean.csv").write_bytes((tmp_path / "test.csv").read_bytes())
    (tmp_path / "train_2.csv").write_bytes((tmp_path / "test.csv").read_bytes())
    assert [row.split for row in read_questions(tmp_path, "pmc_vqa").rows] == ["test", "test_clean", "train_2"]


def test_vqa_med_as_its_test_sets_are_published(tmp_path):
    """Rows of the files of 2019 (CC BY 4.0, Ben Abacha et al.), 2020 and 2021, with made-up pictures."""
    folder = tmp_path / "2019" / "VQAMed2019Test"
    for name in ("synpic54082", "synpic58746", "synpic35645", "synpic31015"):
        picture(folder / "VQAMed2019_Test_Images" / f"{name}.jpg")
    (folder / "VQAMed2019_Test_Questions.txt").write_text("synpic54082|what modality is shown?\n")
    (folder / "VQAMed2019_Test_Questions_w_Ref_Answers.txt").write_text(
        "synpic54082|modality|what modality is shown?|cta - ct angiography\n"
        "synpic58746|modality|is this a contrast or noncontrast ct?|contrast\n"
        "synpic35645|plane|what plane is this film|frontal\n"
        "synpic31015|organ|which organ is captured by this mri?|face, sinuses, and neck\n"
    )
    table = read_questions(tmp_path / "2019", "vqa_med")
    assert [(row.content_type, row.answer, row.split) for row in table.rows] == [
        ("modality", "cta - ct angiography", "test"), ("modality", "contrast", "test"), ("plane", "frontal", "test"),
        ("organ", "face, sinuses, and neck", "test"),
    ]  # fmt: skip
    assert not table.dropped
    folder = tmp_path / "2020"
    for name in ("synpic26840", "synpic38375"):
        picture(folder / f"{name}.jpg")
    (folder / "VQAMed2020-Task1-VQAnswering-Test-Questions.txt").write_text(
        "synpic26840|are there abnormalities in this mri?\nsynpic38375|what is most alarming about this mri?\n"
    )
    (folder / "VQAMed2020-Task1-VQAnswering-Test-ReferenceAnswers.txt").write_text(
        "synpic26840|no\nsynpic38375|orbit,  hemangioma\n"
    )
    (folder / "README_VQAMed2020-Task1-VQA.txt").write_text("image|question\n")
    rows = read_questions(folder, "vqa_med").rows
    assert [(row.answer, row.answer_type) for row in rows] == [("no", "closed"), ("orbit, hemangioma", "open")]
    folder = tmp_path / "2021"
    picture(folder / "synpic51484.jpg")
    (folder / "Task1-VQA-2021-TestSet-Questions.txt").write_text("synpic51484|what is abnormal in the x-ray?\n")
    (folder / "Task1-VQAnswering2021-Test-ReferenceAnswers-4Evaluator.txt").write_text(
        "synpic51484|osteopoikilosis|osteosclerotic lesions\n"
    )
    (row,) = read_questions(folder, "vqa_med").rows
    assert (row.answer, row.also_accepted) == ("osteopoikilosis", ("osteosclerotic lesions",))


def test_slake_as_its_validation_set_is_published(tmp_path):
    """Rows of validate.json (CC BY 4.0, Liu et al. 2021), whose ids count through all files, with a made-up picture."""
    picture(tmp_path / "imgs" / "xmlab0" / "source.jpg")
    row = {
        "img_id": 0, "img_name": "xmlab0/source.jpg", "question": "What modality is used to take this image?",
        "answer": "MRI", "q_lang": "en", "location": "Abdomen", "modality": "MRI", "answer_type": "OPEN",
        "base_type": "vqa", "content_type": "Modality", "triple": ["vhead", "_", "_"], "qid": 9835,
    }  # fmt: skip
    closed = row | {"question": "Does the picture contain liver?", "answer": "Yes", "answer_type": "CLOSED",
                    "content_type": "Organ", "qid": 9840}  # fmt: skip
    for name in ("train", "validate", "test"):
        (tmp_path / f"{name}.json").write_text(json.dumps([row, closed] if name == "validate" else [row]))
    table = read_questions(tmp_path, "slake", language="en").split("validation")
    assert [(r.answer, r.answer_type, r.content_type, r.modality) for r in table.rows] == [
        ("MRI", "open", "Modality", "MRI"), ("Yes", "closed", "Organ", "MRI")
    ]  # fmt: skip


def test_omnimed_vqa_by_access_with_a_misspelt_modality_and_missing_pictures(tmp_path):
    picture(tmp_path / "Images" / "Chest CT Scan" / "test" / "1.png")
    row = {
        "dataset": "Chest CT Scan", "question_id": "Chest CT Scan_0001", "question_type": "Disease Diagnosis",
        "question": "What is the diagnosis?", "gt_answer": "Adenocarcinoma", "option_A": "Adenocarcinoma",
        "option_B": "Normal", "option_C": "Large cell carcinoma", "option_D": "Squamous cell carcinoma",
        "image_path": "Images/Chest CT Scan/test/1.png", "modality": "CT(Computed Tomography)",
    }  # fmt: skip
    below = row | {"question_id": "2", "image_path": "Chest CT Scan/test/1.png"}
    absent = row | {"question_id": "3", "image_path": "Images/Restricted/9.png"}
    for folder, rows in (("Open-access", [row, below]), ("Restricted-access", [absent])):
        (tmp_path / "QA_information" / folder).mkdir(parents=True)
        (tmp_path / "QA_information" / folder / "Chest CT Scan.json").write_text(json.dumps(rows))
    table = read_questions(tmp_path, "omnimed_vqa")
    assert {row.image for row in table.rows} == {"Images/Chest CT Scan/test/1.png"}
    assert {row.modality for row in table.rows} == {"CT(Computed Tomography)"}
    assert len(table.rows[0].options) == 4
    assert table.dropped == {"image_missing": 1}


def raw(**changes):
    row = {"question_id": "1", "image": "a.png", "question": "Is it?", "answer": "yes", "answer_type": "closed"}
    return row | changes


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"image": None}, "no_image"), ({"image": "gone.png"}, "image_missing"), ({"question": " \t"}, "no_question"),
        ({"answer": float("nan")}, "no_answer"), ({"question_id": "0"}, "duplicate_id"),
        ({"options": ["no", "maybe"]}, "answer_not_an_option"),
    ],
)  # fmt: skip
def test_a_question_that_cannot_be_asked_is_one_counted_row(bad, reason):
    table = assemble("set", ".", [raw(question_id="0"), raw(**bad)], exists=lambda image: image == "a.png")
    assert table.dropped == {reason: 1}
    assert len(table.rows) == 1


def test_images_without_questions_are_counted():
    table = assemble("set", ".", [raw()], exists=lambda image: True, pictures=["a.png", "b.png", "c.png"])
    assert table.notes["images_without_questions"] == 2


@pytest.mark.parametrize(("answer", "text"), [(3, "3"), (2.0, "2"), (0.5, "0.5"), (True, "yes"), (False, "no")])
def test_a_numeric_answer_becomes_its_text(answer, text):
    table = assemble("set", ".", [raw(answer=answer)], exists=lambda image: True)
    assert table.rows[0].answer == text
    assert table.notes.get("numeric_answer", 0) == (not isinstance(answer, bool))


def test_trailing_blanks_in_types_are_trimmed_and_counted():
    rows = [raw(question_id=str(i), answer_type=t) for i, t in enumerate(("CLOSED ", "OPEN\t", "closed", "Choice"))]
    table = assemble("set", ".", rows, exists=lambda image: True)
    assert [row.answer_type for row in table.rows] == ["closed", "open", "closed", "closed"]
    assert table.notes == {"type_trimmed": 2, "unknown_answer_type": 1, "answer_type_inferred": 1}


def test_the_wording_of_vqa_rad_s_questions_chooses_some(tmp_path):
    table = table_of(tmp_path, "vqa_rad_mevf")
    assert {row.phrase_type for row in table.rows} == {"freeform", "para"}
    assert [row.question_id for row in table.worded("para").rows] == ["test-1"]
    assert table.worded(None).rows == table.rows
    with pytest.raises(DataError, match=r"no question of phrase type frame \(found freeform, para\)"):
        table.worded("frame")


def test_equal_bytes_are_one_image(tmp_path):
    table = table_of(tmp_path, "huggingface")
    assert [row.image for row in table.rows] == ["train-00000-of-00001.parquet#0"] * 2 + [
        "train-00000-of-00001.parquet#2"
    ]
    assert len({row.group for row in table.rows}) == 2
    manifest = table.manifest()
    assert read_picture(manifest, manifest.rows[1]).getpixel((0, 0)) == (0, 0, 9)


class Runs:
    """What a hostile pickle holds."""

    def __reduce__(self):
        return print, ("ran",)


def test_a_pickle_that_would_run_code_is_not_opened(tmp_path, capsys):
    write_path_vqa(tmp_path)
    (tmp_path / "qas" / "val" / "val_qa.pkl").write_bytes(pickle.dumps([Runs()]))
    with pytest.raises(DataError, match=r"val_qa.pkl: is no pickle of plain values .*print"):
        read_questions(tmp_path, "path_vqa")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.jsonl", '{"image": "a.png"\n', r"train.jsonl:1: is not JSON"),
        ("train.jsonl", "[1]\n", r"must be an object"),
        ("train.jsonl", '{"image": "a.png", "question": "q", "answer": "a"}\n', r"can be asked .*1 image_missing"),
        ("train.jsonl", '{"image": "../a.png", "question": "q", "answer": "a"}\n', r"can be asked .*1 image_missing"),
        ("other.txt", "", r"holds no \*.jsonl"),
    ],
)  # fmt: skip
def test_broken_files_are_one_clear_line(tmp_path, name, text, message):
    (tmp_path / "a.png").write_bytes(b"a picture that lies outside of the data")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_questions(folder, "jsonl")


def test_unknown_layouts_missing_folders_and_empty_splits_are_named(tmp_path):
    with pytest.raises(ConfigError, match="layout: is not known"):
        read_questions(tmp_path, "vqa")
    with pytest.raises(DataError, match="there is no such folder"):
        read_questions(tmp_path / "no", "slake")
    with pytest.raises(DataError, match=r"no question in split validation .*train"):
        table_of(tmp_path, "huggingface").split("validation")


def bytes_tokenizer(texts):
    return [[1, *[10 + byte for byte in text.encode()], 2] for text in texts]


def characters_tokenizer(texts):
    return [[1, *[ord(c) for c in text], 2] for text in texts]


def unknown_tokenizer(texts):
    return [[1, *[100 for _ in text], 2, 0, 0] for text in texts]


@pytest.mark.parametrize("tokenizer", [bytes_tokenizer, unknown_tokenizer])
def test_chinese_with_an_english_tokenizer_is_refused(tmp_path, tokenizer):
    table = table_of(tmp_path, "slake", language="zh")
    with pytest.raises(ConfigError, match="does not know Chinese"):
        check_language(table, tokenizer, "tiny")
    check_language(table, characters_tokenizer, "tiny")
    check_language(read_questions(tmp_path, "slake", language="en"), tokenizer, "tiny")
