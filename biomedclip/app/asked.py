"""What a visitor asks of a picture, as text on the page, and the answer as HTML.

Reads labels with commas and prompts as lines of `label: sentence`, yields the `Question` that a classifier embeds; and
reads one `Classified`, yields bars with the flag in words. Prompts are shown as text because the words decide the
answer: whoever doubts one changes it and asks again.
"""

from __future__ import annotations

from collections.abc import Sequence

from biomedclip.app.cards import write_notice
from biomedclip.app.classify import Classified
from biomedclip.app.questions import Question, ask_labels, ask_task, check_labels
from biomedclip.errors import BiomedclipError, ConfigError
from biomedclip.evaluation.prompts import check_residue
from biomedclip.evaluation.tasks import load_tasks
from biomedclip.files import split_lines
from biomedclip.page.markup import to_text

OWN = ""
"""Instead of a task's name: labels of the visitor's own."""
SHOWN = 12
"""Labels with a bar; the rest is counted."""


def list_questions() -> list[tuple[str, str]]:
    """(shown, name) of the tasks whose labels exclude each other, by title; the visitor's own labels first."""
    tasks = [task for task in load_tasks().values() if task.kind == "zero_shot" and task.labels != "multi"]
    return [("labels of your own", OWN), *sorted((f"{task.title} ({task.modality})", task.name) for task in tasks)]


def write_prompts(question: Question) -> str:
    """A question as lines of `label: sentence`."""
    return "\n".join(f"{label}: {text}" for label, sentences in question.prompts.items() for text in sentences)


def prompts_of_labels(labels: str) -> str:
    """The lines that stand for labels as typed. Raises ConfigError for none, one, two alike, and colons."""
    question = ask_labels(labels)
    for label in question.labels:
        if ":" in label:
            raise ConfigError("labels", "hold a colon, which parts label and prompt here", found=repr(label),
                              todo="write the label without it")  # fmt: skip
    return write_prompts(question)


def read_prompts(text: str, task: str = OWN) -> Question:
    """The question that lines of `label: sentence` ask; a task's own lines ask the task, with its way to join prompts.

    Raises ConfigError for lines without a colon or sentence, for none or one label, and for two that are the same.
    """
    if task:
        asked = ask_task(task)
        if text.strip() == write_prompts(asked):
            return asked
    prompts: dict[str, list[str]] = {}
    for line in split_lines(text.replace("\r", "")):
        if not line.strip():
            continue
        label, colon, sentence = (part.strip() for part in line.partition(":"))
        if not (label and colon and sentence):
            raise ConfigError("prompts", "a line is no `label: sentence`", found=repr(line[:60]),
                              todo="write the label, a colon and what a picture of it shows")  # fmt: skip
        prompts.setdefault(label, [])
        if sentence not in prompts[label]:
            prompts[label].append(sentence)
    check_labels(list(prompts), "prompts")
    check_residue(prompts, "prompts")
    return Question(prompts=prompts, where="prompts")


def write_answer(found: Classified, labels: Sequence[str], about: str) -> str:
    """Probabilities as bars, best first, the flag in words before them, and how they came about after."""
    if found.refused:
        return write_notice(f"{found.name} {found.refused}", kind="warning")
    order = found.best(len(labels))
    top = order[0]
    parts = [f'<p class="bc-top">{to_text(labels[top])} <span>{100 * found.probabilities[top]:.0f} %</span></p>']
    if found.flag:
        words = "Out of scope" if found.flag == "out of scope" else "Uncertain"
        parts.append(write_notice(f"{words}: {found.reason}. Do not rely on this answer.", kind="warning"))
    rows = "".join(_write_bar(labels[i], float(found.probabilities[i])) for i in order[:SHOWN])
    parts.append(f'<table class="bars bc-labels"><tbody>{rows}</tbody></table>')
    if len(labels) > SHOWN:
        rest = float(found.probabilities[order[SHOWN:]].sum())
        parts.append(write_notice(f"{len(labels) - SHOWN} more labels share {100 * rest:.1f} %."))
    notes = ". ".join(part[:1].upper() + part[1:] for part in (found.note, about) if part)
    return f'<div class="bc-answer">{"".join(parts)}<p class="bc-about">{to_text(notes)}</p></div>'


def _write_bar(label: str, share: float) -> str:
    return (
        f'<tr><th scope="row">{to_text(label)}</th><td class="track"><i class="kept" '
        f'style="width:{max(100 * share, 0.15):.2f}%"></i></td><td class="number">{100 * share:.1f} %</td></tr>'
    )


def say(error: BiomedclipError) -> str:
    """An error as a warning of the page, where options of the command line have no names."""
    return write_notice(str(error).replace("--labels", "labels").replace("with --window", "in the list of windows"),
                        kind="warning")  # fmt: skip
