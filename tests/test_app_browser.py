"""The page as a user meets it: every tab is clicked through in headless Chromium, on shards of the bundled sample.

Chromium is Debian's (`apt-get install chromium`). Where it is missing the tests are skipped, or fail where
BIOMEDCLIP_REQUIRE_CHROMIUM is set, as in .ci/run. With BIOMEDCLIP_SCREENSHOTS=docs/pictures the pictures of the docs
are taken anew:

    BIOMEDCLIP_SCREENSHOTS=docs/pictures pytest -m slow tests/test_app_browser.py
"""

import io
import os
import re
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from layout_sets import write_dicom
from page_server import serving, write_results
from PIL import Image

from biomedclip.app.cards import RESEARCH_ONLY
from biomedclip.config import config_file, load_config
from biomedclip.models.catalog import bundled_folder
from biomedclip.models.export import WEIGHTS_FILE
from data_builders.build import BuildConfig, build

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SCREENSHOTS = os.environ.get("BIOMEDCLIP_SCREENSHOTS")
WAIT_MS = 240_000
TABS = ("Classify", "Search figures", "Dataset", "Reports")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        if os.environ.get("BIOMEDCLIP_REQUIRE_CHROMIUM"):
            pytest.fail("Chromium is missing: apt-get install chromium")
        pytest.skip("Chromium is missing: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The bundled model, or one without training where its weights are not there."""
    if (bundled_folder("mini") / WEIGHTS_FILE).is_file():
        return "biomedclip-mini"
    import torch

    import biomedclip
    from biomedclip.models.export import export_open_clip
    from biomedclip.models.load import find_origin

    torch.manual_seed(0)
    untrained, _, _ = biomedclip.load("biomedclip-demo", random_init=True)
    config = find_origin("biomedclip-demo", random_init=True).model_cfg
    return str(export_open_clip(untrained, tmp_path_factory.mktemp("model") / "untrained", model_cfg=config))


@pytest.fixture(scope="module")
def site(model, tmp_path_factory):
    """(address, process, private folder's parent) of the page with real shards and made-up results."""
    root = tmp_path_factory.mktemp("site")
    (root / "tmp").mkdir()
    build(load_config(config_file("build/demo_pmc.yaml"), BuildConfig), root / "pmc")
    write_results(root / "results", "before", "after")
    (root / "results" / "notes.html").write_text("<h1>Notes</h1><script>window.top.broken = 1</script>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIOMEDCLIP_CACHE", str(root / "cache"))
        arguments = ("--dataset", str(root / "pmc"), "--results", str(root / "results"), "--model", model)
        with serving(*arguments, "--max-upload-mb", "5", temporary=root / "tmp") as (address, process):
            yield address, process, root / "tmp"


class Visitor:
    """A browser window on the page, and everything that it asked for or complained about."""

    def __init__(self, browser, address, width=1280, height=900):
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="light")
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#classify-ask")

    def _note(self, kind, text):
        # A refused upload is an answer of 413, which Chromium prints as an error.
        if kind == "error" and "413" not in text:
            self.complaints.append(text)

    def reload(self):
        """The page anew. What the old one says of answers that it can no longer wait for is no complaint."""
        complaints = list(self.complaints)
        self.page.reload()
        self.page.wait_for_selector("#classify-ask")
        self.complaints = complaints

    def open(self, tab):
        self.page.get_by_role("tab", name=tab, exact=True).click()
        return self.page

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    def picture(self, name):
        """Keep the window as it is for the docs, in 256 colours, which is a third of the bytes."""
        if SCREENSHOTS:
            self.page.wait_for_timeout(700)
            taken = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
            taken.quantize(256, dither=Image.Dither.NONE).save(Path(SCREENSHOTS) / f"app_{name}.png", optimize=True)


@pytest.fixture
def visitor(chromium, site):
    visitor = Visitor(chromium, site[0])
    yield visitor
    hosts = {urlsplit(url).netloc for url in visitor.requests if not url.startswith(("data:", "blob:", "about:"))}
    visitor.context.close()
    assert hosts == {urlsplit(site[0]).netloc}
    assert visitor.complaints == []


def choose_example(page, name):
    page.locator("#classify-examples button", has_text=name).first.click()
    page.wait_for_selector("#classify-preview img")
    page.wait_for_function(
        f"document.querySelector('#classify-about').innerText.startsWith('{name.replace(' ', '_')},')"
    )
    page.wait_for_timeout(500)  # the other fields of the same answer follow one by one


def read_bars(page):
    """{label: percent} of the answer, in the order on the screen."""
    page.wait_for_selector("#classify-answer .bc-top, #classify-answer .bc-warning")
    said = page.locator("#classify-answer").inner_text()
    assert page.locator("#classify-answer .bc-top").count(), said
    rows = page.locator("#classify-answer table.bars tr").all()
    return {row.locator("th").inner_text(): float(row.locator(".number").inner_text().split()[0]) for row in rows}


def test_an_example_is_classified_and_its_evidence_shown(visitor):
    page = visitor.page
    assert "No answer yet" in visitor.text("#classify-answer")
    choose_example(page, "xray")
    assert page.locator("#classify-task input").input_value().startswith("Pneumonia")
    page.locator("#classify-ask").click()
    bars = read_bars(page)
    assert len(bars) == 2
    assert sum(bars.values()) == pytest.approx(100, abs=0.2)
    assert list(bars.values()) == sorted(bars.values(), reverse=True)
    visitor.picture("classify")
    page.locator("#evidence-show").click()
    page.wait_for_selector("#evidence-picture img")
    assert "hiding the hottest tenth" in visitor.text("#evidence-check")
    assert page.locator("#evidence-picture img").evaluate("image => image.naturalWidth") > 400
    page.locator("#evidence-picture").scroll_into_view_if_needed()
    assert page.evaluate("window.scrollY") > 100
    box = page.get_by_text(RESEARCH_ONLY, exact=True).bounding_box()
    assert 0 <= box["y"] < 200, "the line leaves the screen"
    visitor.picture("evidence")


def test_labels_and_prompts_are_the_visitors_own(visitor):
    page = visitor.page
    choose_example(page, "blood cell")
    page.locator("#classify-labels textarea, #classify-labels input").first.fill("a cell, a car, a tree")
    page.locator("#classify-ask").click()
    assert set(read_bars(page)) == {"a cell", "a car", "a tree"}
    assert page.locator("#classify-task input").input_value() == "labels of your own"
    page.locator("#classify-words button").first.click()
    prompts = page.locator("#classify-prompts textarea")
    assert prompts.input_value().startswith("a cell: a cell\n")
    prompts.fill("cell: a stained blood cell\nscan: a CT scan")
    page.locator("#classify-ask").click()
    page.wait_for_function("document.querySelector('#classify-answer').innerText.includes('scan')")
    assert set(read_bars(page)) == {"cell", "scan"}
    page.locator("#classify-labels textarea, #classify-labels input").first.fill("only one")
    page.locator("#classify-ask").click()
    page.wait_for_function("document.querySelector('#classify-answer').innerText.includes('is one label')")
    assert page.locator("#classify-answer .bc-top").count() == 0


def test_uploads_are_pictures_or_a_line_that_says_why_not(visitor, tmp_path):
    page, upload = visitor.page, "#classify-upload input[type=file]"
    frames = np.stack([np.full((40, 60), 60 * n, np.uint8) for n in range(3)])
    page.set_input_files(upload, write_dicom(tmp_path / "loop.dcm", frames, Modality="US"))
    page.wait_for_selector("#classify-frame input")
    assert "60 x 40 px, frame 0" in visitor.text("#classify-about")
    visitor.reload()
    (tmp_path / "words.jpg").write_text("no picture at all")
    page.set_input_files(upload, tmp_path / "words.jpg")
    page.wait_for_selector("#classify-about .bc-warning")
    assert "is no picture, whatever its name says" in visitor.text("#classify-about")
    visitor.reload()
    (tmp_path / "large.png").write_bytes(bytes(6_000_000))
    page.set_input_files(upload, tmp_path / "large.png")
    page.get_by_text(re.compile("maximum allowed size|too large", re.I)).first.wait_for()


def test_figures_are_found_by_words_and_by_a_picture(visitor, site):
    page = visitor.open("Search figures")
    assert "Nothing asked yet" in visitor.text("#search-found")
    page.locator("#search-words textarea, #search-words input").first.fill("photomicrographs of stained cells")
    page.locator("#search-ask").click()
    page.wait_for_selector("#search-found figure")
    cards = page.locator("#search-found figure").all()
    assert len(cards) == 12
    assert all(re.search(r"CC0|CC BY", card.inner_text()) for card in cards)
    assert "of 99 figures" in visitor.text("#search-found")
    visitor.picture("search")
    sample = Path(__file__).parent.parent / "biomedclip" / "app" / "examples" / "figure.jpg"
    page.set_input_files("#search-upload input[type=file]", sample)
    page.wait_for_function("document.querySelector('#search-found').innerText.includes('figure.jpg')")
    first = page.locator("#search-found figure").first.inner_text()
    assert "eLife.30274" in first, "the picture is in the dataset and was not found"
    assert float(re.search(r"cosine ([\d.]+)", first).group(1)) > 0.95


def test_a_dataset_shows_its_funnel_and_its_samples_by_field(visitor):
    page = visitor.open("Dataset")
    page.wait_for_selector("#dataset-samples figure")
    assert "131 seen = 99 kept + 32 dropped" in visitor.text("#dataset-about")
    assert "1 to 12 of 99" in visitor.text("#dataset-place")
    visitor.picture("dataset")
    page.get_by_role("button", name="Next").click()
    page.get_by_text("13 to 24 of 99").wait_for()
    page.locator("#field-split input").click()
    page.get_by_role("option", name="test (33)").click()
    page.get_by_text("1 to 12 of 33").wait_for()
    assert all("test" in card.inner_text() for card in page.locator("#dataset-samples figure").all())
    page.locator("#field-words textarea, #field-words input").first.fill("no such article")
    page.locator("#field-words textarea, #field-words input").first.press("Enter")
    page.get_by_text("No sample is like this").wait_for()


def test_results_are_compared_and_reports_opened_in_a_frame(visitor):
    page = visitor.open("Reports")
    page.wait_for_selector("#results-table table")
    assert "Blood cells (BCCD)" in visitor.text("#results-table")
    page.locator("#results-compare").click()
    page.wait_for_selector("#results-changes table")
    assert "better" in visitor.text("#results-changes")
    page.locator("#results-open").click()
    page.frame_locator("#results-frame iframe").get_by_role("heading", name="Evaluation", exact=True).wait_for()
    visitor.picture("reports")
    page.locator("#results-report input").click()
    page.get_by_role("option", name="notes.html").click()
    page.locator("#results-open").click()
    page.frame_locator("#results-frame iframe").get_by_role("heading", name="Notes").wait_for()
    assert page.evaluate("window.broken") is None
    # Chromium says in its console that the sandbox kept a script from running, which is what was wanted.
    visitor.complaints = [text for text in visitor.complaints if "sandboxed" not in text]


def test_a_narrow_window_shows_everything_without_scrolling_sideways(chromium, site):
    visitor = Visitor(chromium, site[0], 390, 844)
    for tab in TABS:
        choices = visitor.page.get_by_role("tab", name=tab, exact=True)
        if not choices.is_visible():
            visitor.page.locator("#bc-tabs .overflow-menu > button").first.click()
            visitor.page.locator("#bc-tabs .overflow-dropdown button", has_text=tab).click()
        else:
            choices.click()
        visitor.page.wait_for_timeout(500)
        wide = visitor.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, f"{tab} is {wide} px too wide"
        assert visitor.page.get_by_text(RESEARCH_ONLY, exact=True).is_visible()
    visitor.context.close()


def test_ctrl_c_ends_it_cleanly_and_leaves_no_file(chromium, site):
    import signal

    address, process, temporary = site
    visitor = Visitor(chromium, address)
    assert list(temporary.glob("biomedclip-page-*"))
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert time.monotonic() - start < 30
    assert not list(temporary.glob("biomedclip-page-*"))
    said = (temporary / "said.txt").read_text()
    assert "Traceback" not in said
    assert "Warning" not in said
    visitor.context.close()
