"""The tab that classifies a picture and shows where the evidence for a label lies.

Reads an upload or a bundled example; yields a preview, probabilities as bars with the flag in words, and the map of
the evidence with the result of its own check. The components are attributes of one object, because nearly every event
reads or writes most of them; what they show is made by plain functions (`asked.py`, `chosen.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from biomedclip.app.asked import OWN, list_questions, prompts_of_labels, read_prompts, say, write_answer, write_prompts
from biomedclip.app.cards import write_empty, write_notice
from biomedclip.app.chosen import SUFFIXES, Chosen, describe, list_windows, shrink
from biomedclip.app.classify import Classifier
from biomedclip.app.holdings import Holdings
from biomedclip.app.pictures import Picture, list_samples
from biomedclip.app.questions import ask_task
from biomedclip.errors import BiomedclipError, DataError
from biomedclip.page.markup import to_text

_CREDIT = "Cell: BCCD (MIT). X-rays: PneumoniaMNIST (CC BY 4.0). Figure: doi:10.7554/eLife.30274 (CC BY 4.0)."
_FIRST_LABELS = "normal chest X-ray, pneumonia"
_FIGURE_LABELS = "bar chart, gel or blot, micrograph, chest X-ray"
_FITTING = {"xray": "pneumoniamnist", "xray_normal": "pneumoniamnist", "blood_cell": "bccd"}
"""The task that asks what may be seen on a bundled example; the others are asked for kinds of figures."""
_NO_ANSWER = write_empty("No answer yet", "Choose a picture, then press Classify.")
_NO_MAP = write_empty("No map yet", "Classify a picture, choose one of its labels, then press Show.")
_ONE_FRAME = [("0", 0)]


def classify_picture(holdings: Holdings, picture: Picture, prompts: str, task: str) -> tuple[str, list[str]]:
    """(answer as HTML, labels best first). Raises ConfigError for prompts that ask nothing."""
    classifier = Classifier(holdings.encoder(), read_prompts(prompts, task))
    (found,) = classifier.classify([picture])
    order = [classifier.labels[place] for place in found.best(len(classifier.labels))]
    return write_answer(found, classifier.labels, classifier.describe()), order


def explain_label(
    holdings: Holdings, image: Image.Image, prompts: str, label: str, against: str
) -> tuple[Image.Image, str]:
    """(the map beside the picture, the result of its check as HTML). Raises DataError for a label without a prompt."""
    from biomedclip.app.explain import explain_picture

    asked = read_prompts(prompts).prompts
    if not label:
        raise DataError("evidence", "no label is chosen", todo="classify the picture first")
    for name in (label, against):
        if name and name not in asked:
            raise DataError("evidence", "there is no such label any more", found=repr(name), todo="classify again")
    encoder, other = holdings.encoder(), asked[against][0] if against else None
    shown = explain_picture(encoder.model, encoder.preprocess, encoder.tokenizer, image, asked[label][0], other)
    check = shown.faithfulness
    return shown.overlay, write_notice(f"Check: {check.describe()}.", kind="note" if check.holds else "warning")


def add_classify_tab(holdings: Holdings, page: gr.Blocks) -> None:
    """Put the tab's components and events into the page that is being built."""
    del page
    _ClassifyTab(holdings)


class Written(NamedTuple):
    """What the page wrote last: labels, the prompts that stand for them, their task, and the prompts before."""

    labels: str
    prompts: str
    task: str
    before: str | None = None


class _ClassifyTab:
    def __init__(self, holdings: Holdings) -> None:
        self.holdings, self.samples = holdings, list_samples()
        self.chosen = gr.State(None)
        self.written = gr.State(Written(_FIRST_LABELS, prompts_of_labels(_FIRST_LABELS), OWN))
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                self._add_picture()
            with gr.Column(scale=6, min_width=300):
                self._add_question()
                self._add_evidence()
        self.overlay = gr.Image(
            show_label=False, interactive=False, buttons=["download"], visible=False, format="png",
            elem_id="evidence-picture",
        )  # fmt: skip
        self._connect()

    def _add_picture(self) -> None:
        self.upload = gr.File(
            label="Your picture: JPEG, PNG, TIFF, WebP, DICOM or NIfTI", file_types=list(SUFFIXES), height=84,
            elem_id="classify-upload",
        )  # fmt: skip
        gr.HTML(f'<p class="bc-label">Or one of ours. {to_text(_CREDIT)}</p>')
        self.examples = gr.Gallery(
            [(str(path), name.replace("_", " ")) for name, path in self.samples.items()], show_label=False, height=124,
            columns=max(4, min(len(self.samples), 6)), allow_preview=False, object_fit="cover", buttons=[],
            interactive=False, elem_id="classify-examples",
        )  # fmt: skip
        self.preview = gr.Image(
            label="The picture", interactive=False, buttons=[], height=300, format="png", elem_id="classify-preview"
        )
        self.about = gr.HTML(elem_id="classify-about")
        self.number = gr.Dropdown(
            _ONE_FRAME, value=0, label="Frame or slice", visible=False, elem_id="classify-frame"
        )  # fmt: skip
        with gr.Accordion("Grey of more than 8 bits, and CT", open=False):
            self.window = gr.Dropdown(
                list_windows(), value="", label="Window: which values are black and white", elem_id="classify-window"
            )

    def _add_question(self) -> None:
        self.task = gr.Dropdown(list_questions(), value=OWN, label="Question", elem_id="classify-task")
        self.labels = gr.Textbox(
            _FIRST_LABELS, label="Labels, with commas between them", max_lines=3, elem_id="classify-labels"
        )
        with gr.Accordion("Prompts: what the model reads for each label", open=False, elem_id="classify-words"):
            self.prompts = gr.Textbox(
                prompts_of_labels(_FIRST_LABELS), lines=6, max_lines=14, show_label=False, elem_id="classify-prompts",
                info="One line a prompt: label: sentence. A label may have several.",
            )  # fmt: skip
        self.ask = gr.Button("Classify", variant="primary", elem_id="classify-ask")
        self.answer = gr.HTML(_NO_ANSWER, elem_id="classify-answer")

    def _add_evidence(self) -> None:
        gr.HTML("<h3>Where the evidence lies</h3>")
        with gr.Row(equal_height=True):
            self.label = gr.Dropdown([], label="Evidence for", elem_id="evidence-label", min_width=130)
            self.against = gr.Dropdown(
                [("anything else", "")], value="", label="rather than", elem_id="evidence-against", min_width=130
            )
            self.show = gr.Button("Show", elem_id="evidence-show", min_width=90, scale=0)
        self.check = gr.HTML(_NO_MAP, elem_id="evidence-check")

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        at_picture, empty = quiet | {"show_progress_on": self.preview}, [self.answer, self.check, self.overlay]
        words = [self.task, self.labels, self.prompts, self.written]
        taken = [self.chosen, self.preview, self.about, self.number, *empty]
        gr.on(
            [self.upload.upload, self.upload.clear], self.take_upload, [self.upload, self.window], taken, **at_picture
        )
        self.examples.select(self.take_example, self.window, [self.upload, *words, *taken], **at_picture)
        self.window.input(self.take_window, [self.chosen, self.window], taken, **at_picture)
        self.number.input(
            self.turn, [self.chosen, self.number], [self.preview, self.about, *empty], **at_picture
        )  # fmt: skip
        self.task.input(self.fill_in, [self.task, self.prompts], words[1:], **quiet)
        gr.on([self.labels.submit, self.labels.blur], self.change_labels, words,
              [self.task, self.prompts, self.written, self.answer], **quiet)  # fmt: skip
        self.ask.click(
            self.classify, [self.chosen, self.number, *words],
            [self.answer, self.task, self.prompts, self.written, self.label, self.against, self.check, self.overlay],
            show_progress_on=self.answer, **quiet,
        )  # fmt: skip
        self.show.click(
            self.explain, [self.chosen, self.number, self.prompts, self.label, self.against],
            [self.overlay, self.check], show_progress_on=self.check, **quiet,
        )  # fmt: skip

    def take_upload(self, path: str | None, window: str) -> tuple[Any, ...]:
        return self._take(Chosen(Path(path), Path(path).name, window) if path else None)

    def take_example(self, window: str, event: gr.SelectData) -> tuple[Any, ...]:
        names = list(self.samples)
        name = names[event.index] if isinstance(event.index, int) and 0 <= event.index < len(names) else names[0]
        task = _FITTING.get(name, OWN)
        return (
            None, task, *self.fill_in(task, own=_FIGURE_LABELS), *self._take(Chosen(self.samples[name], name, window))
        )  # fmt: skip

    def take_window(self, chosen: Chosen | None, window: str) -> tuple[Any, ...]:
        return self._take(Chosen(chosen.path, chosen.name, window) if chosen else None)

    def _take(self, chosen: Chosen | None) -> tuple[Any, ...]:
        rest = (_NO_ANSWER, _NO_MAP, gr.Image(None, visible=False))
        hidden = gr.Dropdown(_ONE_FRAME, value=0, visible=False)
        if chosen is None:
            return None, None, "", hidden, *rest
        try:
            picture, image = chosen.read()
            frames = chosen.frames()
        except BiomedclipError as error:
            # It is kept: another window may be what it needs.
            return chosen, None, say(error), hidden, *rest
        names = [(str(frame), place) for place, frame in enumerate(frames or [0])]
        pick = gr.Dropdown(names, value=0, visible=len(frames) > 1)
        return chosen, shrink(image), describe(picture, image), pick, *rest

    def turn(self, chosen: Chosen | None, number: int) -> tuple[Any, ...]:
        rest = (_NO_ANSWER, _NO_MAP, gr.Image(None, visible=False))
        if chosen is None:
            return None, "", *rest
        try:
            picture, image = chosen.read(number)
        except BiomedclipError as error:
            return None, say(error), *rest
        return shrink(image), describe(picture, image), *rest

    def fill_in(self, task: str, prompts: str = "", own: str = _FIRST_LABELS) -> tuple[str, str, Written]:
        question = ask_task(task) if task else None
        shown = ", ".join(question.labels) if question else own
        new = write_prompts(question) if question else prompts_of_labels(own)
        return shown, new, Written(shown, new, task, before=prompts)

    def change_labels(self, task: str, labels: str, prompts: str, written: Written) -> tuple[Any, ...]:
        if labels == written.labels:
            return task, prompts, written, gr.skip()
        try:
            new = prompts_of_labels(labels)
            return OWN, new, Written(labels, new, OWN, before=prompts), gr.skip()
        except BiomedclipError as error:
            return task, prompts, written, say(error)

    def classify(
        self, chosen: Chosen | None, number: int, task: str, labels: str, prompts: str, written: Written
    ) -> tuple[Any, ...]:
        same = (task, prompts, written, gr.Dropdown(), gr.Dropdown(), _NO_MAP, gr.Image(None, visible=False))
        if chosen is None:
            return write_notice("Choose a picture first: upload one, or click one of ours.", kind="warning"), *same
        try:
            # A click on the button leaves the field of labels and asks at the same moment: the labels go first.
            # The field's own event may have answered already, and not yet in the browser: its old prompts are stale.
            if labels != written.labels:
                task, prompts = OWN, prompts_of_labels(labels)
            elif prompts == written.before:
                task, prompts = written.task, written.prompts
            answer, order = classify_picture(self.holdings, chosen.read(number)[0], prompts, task)
        except BiomedclipError as error:
            return say(error), *same
        others = gr.Dropdown([("anything else", ""), *((name, name) for name in order)], value=order[1])
        best = gr.Dropdown(order, value=order[0])
        return (
            answer,
            task,
            prompts,
            Written(labels, prompts, task),
            best,
            others,
            _NO_MAP,
            gr.Image(None, visible=False),
        )

    def explain(
        self, chosen: Chosen | None, number: int, prompts: str, label: str | None, against: str | None
    ) -> tuple[Any, ...]:
        hidden = gr.Image(None, visible=False)
        if chosen is None:
            return hidden, write_notice("Choose and classify a picture first.", kind="warning")
        try:
            _, image = chosen.read(number)
            overlay, check = explain_label(self.holdings, image, prompts, label or "", against or "")
        except BiomedclipError as error:
            return hidden, say(error)
        return gr.Image(overlay, visible=True), check
