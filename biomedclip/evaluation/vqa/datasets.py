"""Sets of questions about images, each as it is published, to one `QuestionTable`.

Reads a folder and the name of its layout; nothing is unpacked, renamed or downloaded. Each reader is a generator of
raw rows with the fields of `Question`; `questions.assemble` checks and counts them. Pickles (PathVQA) are opened by an
unpickler that knows no classes, so no file can run code. Each reader says how far its format was checked: VQA-RAD in
MEVF's packaging on the whole real set; SLAKE and VQA-Med's questions and answers against rows of the published files;
PMC-VQA and OmniMedVQA against their descriptions and the code of others; none of the last four with its images.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from biomedclip.errors import ConfigError, DataError
from biomedclip.evaluation.vqa.questions import QuestionTable, assemble
from biomedclip.files import split_lines

Layout = Literal[
    "vqa_rad", "vqa_rad_mevf", "slake", "path_vqa", "vqa_med", "pmc_vqa", "omnimed_vqa", "huggingface", "jsonl"
]  # fmt: skip
LAYOUTS: tuple[str, ...] = get_args(Layout)
_PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".gif", ".webp"}
Row = dict[str, Any]


def read_questions(
    root: str | Path, layout: str, *, language: str | None = None, name: str | None = None
) -> QuestionTable:
    """The table of a data set in `root`; `language` keeps only questions of that language (SLAKE: en, zh).

    Layouts: vqa_rad (public JSON), vqa_rad_mevf (trainset.json and testset.json), slake, path_vqa, vqa_med (2019 to
    2021), pmc_vqa, omnimed_vqa, huggingface (parquet with image, question, answer), jsonl (lines or files with the
    fields of `Question`). Raises ConfigError for an unknown layout, DataError for files that are missing or broken.
    """
    root = Path(root)
    if layout not in LAYOUTS:
        raise ConfigError("layout", "is not known", found=layout, todo=f"one of {', '.join(LAYOUTS)}")
    if not root.exists():
        raise DataError(root, "there is no such folder", todo=f"name the folder of the {layout} data")
    rows = _READERS[layout](root)
    if language is not None:
        rows = (row for row in rows if (row.get("language") or "en") == language)
    folder = root.parent if root.is_file() else root
    pictures = [] if layout == "huggingface" else _pictures_in(folder)
    known = set(pictures)

    def exists(image: str) -> bool:
        # A row may name what the listing leaves out, but nothing outside of the data's folder.
        path = (folder / image.partition("#")[0]).resolve()
        return image in known or (path.is_file() and path.is_relative_to(folder.resolve()))

    return assemble(name or layout, folder, rows, exists=exists, pictures=pictures)


def _pictures_in(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES and path.name != "mask.png")
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _read_json(path: Path) -> list[Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise DataError(path, "is not JSON that can be read", found=str(error)[:120]) from None
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise DataError(path, "must hold a list of questions", found=type(value).__name__)
    return value


def _find(root: Path, pattern: str, layout: str) -> list[Path]:
    found = sorted(path for path in root.rglob(pattern) if path.is_file())
    if not found:
        raise DataError(root, f"holds no {pattern}", todo=f"name the folder of the {layout} data, or another layout")
    return found


def _image_folder(root: Path, *names: str) -> str:
    """The first of these folders that there is, as a prefix."""
    return next((f"{name}/" for name in names if (root / name).is_dir()), "")


def _read_vqa_rad(root: Path) -> Iterator[Row]:
    """The public JSON: rows whose phrase type starts with `test` are the test split; linked ids ask the same."""
    files = [path for path in root.glob("*.json") if "VQA" in path.name.upper()] or _find(root, "*.json", "vqa_rad")
    prefix = _image_folder(root, "VQA_RAD Image Folder", "images")
    for row in _read_json(files[0]):
        image = str(row.get("image_name") or "").strip()
        yield _rad_row(row, image and prefix + image, _rad_split(row)) | {"phrase_id": row.get("qid_linked_id")}


def _rad_split(row: Row) -> str:
    return "test" if str(row.get("phrase_type", "")).strip().startswith("test") else "train"


def _rad_row(row: Row, image: str, split: str) -> Row:
    return {
        "question_id": row.get("qid"), "image": image, "question": row.get("question"), "answer": row.get("answer"),
        "answer_type": row.get("answer_type"), "organ": row.get("image_organ"), "split": split,
        "content_type": _rad_type(row.get("question_type")),
        "phrase_type": str(row.get("phrase_type") or "").strip().removeprefix("test_"),
    }  # fmt: skip


def _rad_type(value: Any) -> str:
    """Types as a sorted list, without the two misspellings of the release."""
    parts = [part.strip().upper() for part in str(value or "").split(",") if part.strip()]
    return ", ".join(sorted({"PRSE": "PRES", "ATRIB": "ATTRIB"}.get(part, part) for part in parts))


def _read_rad_mevf(root: Path) -> Iterator[Row]:
    """MEVF's packaging: ids count from one again in other copies of it, so the split is part of the id."""
    prefix = _image_folder(root, "images")
    for split in ("train", "test"):
        for row in _read_json(_find(root, f"{split}set.json", "vqa_rad_mevf")[0]):
            image = str(row.get("image_name") or "").strip()
            yield _rad_row(row, image and prefix + image, split) | {
                "question_id": f"{split}-{row.get('qid')}", "phrase_id": row.get("qid_linked_id")
            }  # fmt: skip


def _read_slake(root: Path) -> Iterator[Row]:
    """SLAKE 1.0, after the published validate.json: ids count through all files, the picture is xmlabN/source.jpg."""
    for name, split in (("train", "train"), ("validate", "validation"), ("test", "test")):
        for row in _read_json(_find(root, f"{name}.json", "slake")[0]):
            image = str(row.get("img_name") or "").strip()
            yield {
                "question_id": f"{split}-{row.get('qid')}", "image": image and f"imgs/{image}",
                "question": row.get("question"), "answer": row.get("answer"), "answer_type": row.get("answer_type"),
                "content_type": row.get("content_type"), "modality": row.get("modality"), "organ": row.get("location"),
                "split": split, "language": row.get("q_lang"),
            }  # fmt: skip


class _Inert(pickle.Unpickler):
    """Lists, dictionaries, strings and numbers; every name of a class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_inert_pickle(path: Path) -> Any:
    """The plain value of a pickle. Raises DataError where it is broken or names anything that could run."""
    try:
        return _Inert(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise DataError(path, "is no pickle of plain values and was not opened", found=str(error)[:120],
                        todo="download it again from the data set's own page") from None  # fmt: skip


def _read_path_vqa(root: Path) -> Iterator[Row]:
    for name, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        path = root / "qas" / name / f"{name}_qa.pkl"
        if not path.is_file():
            path = _find(root, f"{name}_qa.pkl", "path_vqa")[0]
        rows = read_inert_pickle(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(path, "must hold a list of questions", found=type(rows).__name__)
        for number, row in enumerate(rows):
            image = str(row.get("image") or "").strip()
            yield {
                "question_id": f"{split}-{number}", "image": image and f"images/{name}/{image}.jpg",
                "question": row.get("question"), "answer": row.get("answer"), "split": split,
                "content_type": _first_words(row.get("question")),
            }  # fmt: skip


def _first_words(question: Any) -> str:
    """The kind of question where the data names none: its first word, or `yes/no` for a question that begins so."""
    first = str(question or "").split(" ", 1)[0].lower().strip("?,.")
    return "yes/no" if first in _AUXILIARIES else first


_AUXILIARIES = frozenset("is are was were do does did has have had can could will would should".split())


def _read_vqa_med(root: Path) -> Iterator[Row]:
    """VQA-Med 2019 to 2021: `image|question|answer`, 2019's test with a category before the question.

    After the published test files of the three years: those of 2020 and 2021 come as questions (`image|question`) and
    reference answers (`image|answer|answer...`), 2019's once without and once with answers, of which the first is left
    out. Training and validation files (`image|question|answer`) were known from others' code alone.
    """
    places = {path.stem: path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in _PICTURES}
    references: dict[str, list[str]] = {}
    lines: list[tuple[Path, int, list[str]]] = []
    found = _find(root, "*.txt", "vqa_med")
    answered = {path.stem.removesuffix(_WITH_ANSWERS) for path in found if path.stem.endswith(_WITH_ANSWERS)}
    for path in found:
        if "readme" in path.name.lower() or "ByCategory" in path.as_posix() or path.stem in answered:
            continue
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        cells = [
            (i, [c.strip() for c in line.split("|")]) for i, line in enumerate(split_lines(text), 1) if "|" in line
        ]
        if "reference" in path.name.lower():
            references |= {parts[0]: parts[1:] for _, parts in cells}
        else:
            lines += [(path, number, parts) for number, parts in cells]
    for path, number, parts in lines:
        image, category, rest = parts[0], "", parts[1:]
        if len(rest) >= 3 and rest[0].lower() in ("modality", "plane", "organ", "abnormality"):
            category, rest = rest[0].lower(), rest[1:]
        answers = rest[1:] or references.get(image, [])
        # 2019's modality answers name alternatives with a # between them.
        answers = [one for answer in answers for one in answer.split("#")]
        yield {
            "where": f"{path.name}:{number}", "question_id": f"{path.stem}-{number}", "image": places.get(image, image),
            "question": rest[0] if rest else "", "answer": answers[0] if answers else "", "also_accepted": answers[1:],
            "content_type": category or _first_words(rest[0] if rest else ""),
            "split": _split_in(path.relative_to(root).as_posix()),
        }  # fmt: skip


_WITH_ANSWERS = "_w_Ref_Answers"


def _split_in(text: str) -> str:
    name = text.lower()
    for mark, split in (("test", "test"), ("val", "validation"), ("train", "train")):
        if mark in name:
            return split
    return ""


def _read_pmc_vqa(root: Path) -> Iterator[Row]:
    """CSV of questions with four choices, which begin with their letter; the label is a letter.

    After the set's card, which spells the answer's column `Anwser`, and its authors' loader; the files themselves were
    not seen. The split is the file's name (train, test, test_clean, and train_2 and test_2 of the second version),
    because test_clean.csv repeats questions of test.csv; a folder of the second version alone has train and test.
    """
    base = root if root.is_dir() else root.parent
    places = {path.name: path.relative_to(base).as_posix() for path in base.rglob("*") if path.suffix in _PICTURES}
    files = _find(root, "*.csv", "pmc_vqa") if root.is_dir() else [root]
    second = all(path.stem.endswith("_2") for path in files)
    for path in files:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for number, raw in enumerate(csv.DictReader(file), 2):
                row = {(key or "").strip(): (value or "").strip() for key, value in raw.items() if key}
                letters = [f"Choice {letter}" for letter in "ABCD"]
                choices = {name[-1]: _without_letter(row[name]) for name in letters if row.get(name)}
                said = row.get("Answer") or row.get("Anwser", "")
                label = (row.get("Answer_label") or row.get("Anwser_label") or said).upper()
                image = row.get("Figure_path", "")
                yield {
                    "where": f"{path.name}:{number}", "question_id": f"{path.stem}-{number}",
                    "image": image and places.get(image, image), "question": row.get("Question"),
                    "answer": choices.get(label, _without_letter(said)), "options": list(choices.values()),
                    "answer_type": "closed", "split": path.stem.removesuffix("_2") if second else path.stem,
                }  # fmt: skip


def _without_letter(choice: str) -> str:
    return re.sub(r"^[A-D]\s*:\s*", "", choice)


def _read_omnimed(root: Path) -> Iterator[Row]:
    """QA_information/*/*.json: lists of questions with up to four options, all of them test questions.

    After others' loaders, one of which notes that a file says `modality` for `modality_type`; the files themselves were
    not seen. Of questions on restricted data the pictures are not in the release: they are counted as missing.
    """
    for path in _find(root, "*.json", "omnimed_vqa"):
        for number, row in enumerate(_read_json(path)):
            if "gt_answer" not in row:
                break
            yield {
                "where": f"{path.name}[{number}]", "question_id": row.get("question_id") or f"{path.stem}-{number}",
                "image": _omnimed_image(root, row.get("image_path")), "question": row.get("question"),
                "answer": row.get("gt_answer"),
                "options": [row[f"option_{letter}"] for letter in "ABCD" if row.get(f"option_{letter}")],
                "answer_type": "closed", "content_type": row.get("question_type"), "organ": row.get("dataset"),
                "modality": row.get("modality_type") or row.get("modality"), "split": "test",
            }  # fmt: skip


def _omnimed_image(root: Path, path: Any) -> str:
    """Paths begin with Images/, in some copies below it."""
    text = str(path or "").strip()
    return f"Images/{text}" if text and not (root / text).is_file() and (root / "Images" / text).is_file() else text


def _read_huggingface(root: Path) -> Iterator[Row]:
    """Parquet with image, question and answer: no ids and no types; equal bytes are one image."""
    from pyarrow import parquet

    first_at: dict[str, str] = {}
    for path in [root] if root.is_file() else _find(root, "*.parquet", "huggingface"):
        file = parquet.ParquetFile(path)
        if missing := {"image", "question", "answer"} - set(file.schema_arrow.names):
            raise DataError(path, "lacks a column", found=", ".join(sorted(missing)))
        name = path.name if root.is_file() else path.relative_to(root).as_posix()
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=["image", "question", "answer"]):
            for row in batch.to_pylist():
                cell = row["image"]
                data = cell.get("bytes") if isinstance(cell, dict) else cell
                digest = hashlib.sha256(data).hexdigest() if data else ""
                image = first_at.setdefault(digest, f"{name}#{number}") if data else ""
                yield {
                    "question_id": f"{path.stem}-{number}", "image": image, "group": digest[:16],
                    "question": row["question"], "answer": row["answer"], "split": _split_in(path.stem),
                    "content_type": _first_words(row["question"]),
                }  # fmt: skip
                number += 1


def _read_jsonl(root: Path) -> Iterator[Row]:
    """One JSON object a line, with the fields of `Question`; an id may be left out."""
    for path in [root] if root.is_file() else _find(root, "*.jsonl", "jsonl"):
        for number, line in enumerate(split_lines(path.read_text(encoding="utf-8-sig")), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}", "is not JSON", found=str(error)) from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}", "must be an object", found=type(row).__name__)
            yield {
                "where": f"{path.name}:{number}", "split": _split_in(path.stem), **row,
                "question_id": row.get("question_id", row.get("id", f"{path.stem}-{number}")),
            }  # fmt: skip


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "vqa_rad": _read_vqa_rad, "vqa_rad_mevf": _read_rad_mevf, "slake": _read_slake, "path_vqa": _read_path_vqa,
    "vqa_med": _read_vqa_med, "pmc_vqa": _read_pmc_vqa, "omnimed_vqa": _read_omnimed,
    "huggingface": _read_huggingface, "jsonl": _read_jsonl,
}  # fmt: skip
