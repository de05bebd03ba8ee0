"""One table for every set of questions about images, and the checks that a row must pass to be in it.

Reads raw fields, as a layout's reader found them; yields a `QuestionTable` whose rows are complete and whose other
rows are counted by reason: seen = kept + sum(dropped). What is repaired (a type with a blank behind it, a numeric
answer) and what is inferred (open or closed where the data does not say) is counted too, because a number computed on
inferred types is another number. Questions of one image are one group: intervals and validation splits keep them
together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from biomedclip.errors import ConfigError, DataError
from biomedclip.files import sha256_json
from biomedclip.images import read_rgb
from biomedclip.schema import Drop, ImageRef, LabelledImage, Manifest

if TYPE_CHECKING:
    from PIL import Image

AnswerType = Literal["open", "closed"]
_FOREIGN = 0x2E80
"""First code point of the CJK blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question about one image, with its answer."""

    question_id: str
    image: str
    """Path under the table's root; `FILE.parquet#ROW` for a picture inside a parquet file."""
    question: str
    answer: str
    answer_type: AnswerType
    type_inferred: bool = False
    """The data does not say open or closed: it was told from the answer or the options."""
    also_accepted: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    content_type: str = ""
    modality: str = ""
    organ: str = ""
    split: str = ""
    group: str = ""
    """The image, by path or by the hash of its bytes: what resampling keeps together."""
    phrase_id: str | None = None
    """Questions with one phrase id ask the same in other words."""
    phrase_type: str = ""
    """How the question was worded, where the data says: VQA-RAD's `freeform`, `para`, `frame`."""
    language: str = "en"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionTable:
    """The questions of a data set, what was left out, and what was repaired."""

    name: str
    root: str
    rows: tuple[Question, ...]
    drops: tuple[Drop, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)
    """Repairs and inferences by name: `type_trimmed`, `numeric_answer`, `answer_type_inferred`, ..."""

    @property
    def dropped(self) -> dict[str, int]:
        """How many rows each reason cost."""
        return dict(sorted(Counter(drop.reason for drop in self.drops).items()))

    @property
    def sha256(self) -> str:
        """Of the rows, without the root: equal data, equal hash, on any machine."""
        return sha256_json([[str(getattr(row, name)) for name in Question.__slots__] for row in self.rows])

    def split(self, *names: str) -> QuestionTable:
        """The questions of these splits. Raises DataError where there are none."""
        rows = tuple(row for row in self.rows if row.split in names)
        if not rows:
            known = ", ".join(sorted({row.split or "(none)" for row in self.rows})) or "no questions at all"
            raise DataError(self.name, f"has no question in split {' or '.join(names)}", found=known)
        return replace(self, rows=rows, drops=(), notes={})

    def worded(self, phrase_type: str | None) -> QuestionTable:
        """The questions of this phrase type, all for None. Raises DataError where there are none."""
        rows = tuple(row for row in self.rows if phrase_type in (None, row.phrase_type))
        if not rows:
            known = ", ".join(sorted({row.phrase_type for row in self.rows} - {""})) or "no phrase types"
            raise DataError(self.name, f"has no question of phrase type {phrase_type}", found=known)
        return replace(self, rows=rows)

    def manifest(self) -> Manifest:
        """Every image once, as the evaluator's embedding takes it; pictures are fetched by `read_picture`."""
        names = list(dict.fromkeys(row.image for row in self.rows))
        rows = tuple(LabelledImage(sample_id=name, image=ImageRef(path=name.partition("#")[0])) for name in names)
        return Manifest(name=self.name, root=self.root, kind="caption", classes=(), rows=rows,
                        sha256=sha256_json(names))  # fmt: skip


Raw = Mapping[str, Any]
"""Fields by the names of `Question`; `where` says line or row for messages."""


def assemble(
    name: str, root: str | Path, raws: Iterable[Raw], *, exists: Callable[[str], bool], pictures: Iterable[str] = ()
) -> QuestionTable:
    """The table of the rows that can be asked.

    A row is dropped as `no_image` (none named), `image_missing` (not in the data), `no_question`, `no_answer`,
    `duplicate_id` (the first is kept) or `answer_not_an_option`. `pictures` are all images there are: those that no
    question names are counted as `images_without_questions`. Raises DataError where nothing is left.
    """
    rows: list[Question] = []
    drops: list[Drop] = []
    notes: Counter[str] = Counter()
    ids: set[str] = set()
    there: dict[str, bool] = {}
    for raw in raws:
        values = dict(raw)
        where = str(values.pop("where", values.get("question_id", "")))
        row, reason = _check(values, notes)
        if row is not None:
            if row.image not in there:
                there[row.image] = exists(row.image)
            if not there[row.image]:
                reason = "image_missing"
            elif row.question_id in ids:
                reason = "duplicate_id"
        if reason or row is None:
            drops.append(Drop(source=name, item=where, reason=reason or "no_question", detail=str(raw)[:120]))
            continue
        ids.add(row.question_id)
        notes["answer_type_inferred"] += row.type_inferred
        rows.append(row)
    unasked = set(pictures) - {row.image for row in rows}
    if unasked:
        notes["images_without_questions"] = len(unasked)
    table = QuestionTable(name=name, root=str(root), rows=tuple(rows), drops=tuple(drops), notes=+notes)
    if not rows:
        found = ", ".join(f"{count:,} {reason}" for reason, count in table.dropped.items()) or "no rows"
        raise DataError(f"{name}: {root}", "holds no question that can be asked", found=found,
                        todo="check the path of the images and the layout")  # fmt: skip
    return table


def _check(values: dict[str, Any], notes: Counter[str]) -> tuple[Question | None, str | None]:
    """The row, or why it cannot be asked."""
    answer = values.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        if isinstance(answer, float) and math.isnan(answer):
            return None, "no_answer"
        notes["numeric_answer"] += 1
        answer = int(answer) if float(answer).is_integer() else answer
    names = ("image", "question", "content_type", "modality", "organ", "split", "phrase_type")
    text = {key: _text(values.get(key)) for key in names}
    answer = _text("yes" if answer is True else "no" if answer is False else answer)
    if not text["image"]:
        return None, "no_image"
    if not text["question"]:
        return None, "no_question"
    if not answer:
        return None, "no_answer"
    options = tuple(_text(option) for option in values.get("options") or () if _text(option))
    if options and answer not in options:
        return None, "answer_not_an_option"
    kind, inferred = _answer_type(values.get("answer_type"), answer, options, notes)
    phrase = values.get("phrase_id")
    return Question(
        question_id=_text(values.get("question_id")), answer=answer, answer_type=kind, type_inferred=inferred,
        also_accepted=tuple(_text(other) for other in values.get("also_accepted") or () if _text(other)),
        options=options, group=_text(values.get("group")) or text["image"],
        phrase_id=None if phrase in (None, "") else str(phrase), language=_text(values.get("language")) or "en", **text,
    ), None  # fmt: skip


def _answer_type(given: Any, answer: str, options: Sequence[str], notes: Counter[str]) -> tuple[AnswerType, bool]:
    raw = "" if given is None else str(given)
    name = raw.strip().lower()
    if name in ("open", "closed", "close"):
        notes["type_trimmed"] += raw != raw.strip()
        return ("open" if name == "open" else "closed"), False
    notes["unknown_answer_type"] += bool(name)
    closed = bool(options) or answer.strip(" .").lower() in ("yes", "no", "是", "否", "不是", "是的")
    return ("closed" if closed else "open"), True


def _text(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split())


def read_picture(manifest: Manifest, row: LabelledImage) -> Image.Image:
    """The picture of a row of `QuestionTable.manifest`, 8-bit RGB. Raises DataError, naming it."""
    path = Path(manifest.root) / row.image.path
    where = f"{manifest.root}: {row.sample_id}"
    number = row.sample_id.partition("#")[2]
    if not number:
        try:
            return read_rgb(path.read_bytes(), where)
        except OSError as error:
            raise DataError(where, "cannot be read", found=error.strerror) from None
    from pyarrow import parquet

    file, start = parquet.ParquetFile(path), int(number)
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if start < size:
            cell = file.read_row_group(group, columns=["image"]).column("image")[start].as_py()
            return read_rgb(cell["bytes"] if isinstance(cell, dict) else cell, where)
        start -= size
    raise DataError(where, "there is no such row")


def check_language(table: QuestionTable, tokenizer: Callable[[list[str]], Any], model: str) -> None:
    """Raise ConfigError where questions are Chinese and the tokenizer does not know the script.

    Told by what it makes of them: an English byte-level vocabulary needs two or more tokens a character, an English
    word-piece vocabulary maps most characters to one and the same unknown token.
    """
    texts = [row.question for row in table.rows if any(ord(c) >= _FOREIGN for c in row.question)][:64]
    if not texts:
        return
    # Pieces of eight characters fit any context length, so that nothing is cut off.
    pieces = ["".join(c for c in text if ord(c) >= _FOREIGN)[:8] for text in texts]
    tokens = [[int(t) for t in line if int(t) != 0] for line in tokenizer(pieces)]
    characters = sum(map(len, pieces))
    spent = sum(len(line) - 2 for line in tokens)
    known = len({t for line in tokens for t in line}) / max(1, len(set("".join(pieces))))
    if spent / characters > 1.5 or known < 0.5:
        raise ConfigError(
            f"{table.name}: language", f"has Chinese questions, and the tokenizer of {model} does not know Chinese",
            found=f"{spent / characters:.1f} tokens a character",
            todo="choose language: en, or a model with a multilingual tokenizer",
        )  # fmt: skip
