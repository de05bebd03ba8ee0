"""The page: one header that never leaves the screen, four tabs, and the look.

Puts the tabs together; what each does is in `tab_classify`, `tab_search`, `tab_dataset` and `tab_reports`. Fonts are
the system's and colours those of this project's HTML reports; nothing is fetched from outside of the package.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import gradio as gr

from biomedclip import __version__
from biomedclip.app.cards import RESEARCH_ONLY
from biomedclip.app.holdings import Holdings
from biomedclip.app.tab_classify import add_classify_tab
from biomedclip.app.tab_dataset import add_dataset_tab
from biomedclip.app.tab_reports import add_reports_tab
from biomedclip.app.tab_search import add_search_tab
from biomedclip.page.markup import to_text

_FOLDER = Path(str(resources.files("biomedclip.app")))
CSS = (_FOLDER / "page.css").read_text(encoding="utf-8")
ICON = _FOLDER / "icon.png"
_TEAL = gr.themes.Color(
    name="teal", c50="#eef7fa", c100="#d9ebf1", c200="#b3d7e3", c300="#84bdd1", c400="#4b9dba", c500="#0b6e8f",
    c600="#0a617e", c700="#08516a", c800="#074255", c900="#053342", c950="#03222d",
)  # fmt: skip
_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")
TABS = ("Classify", "Search figures", "Dataset", "Reports")


def build_page(holdings: Holdings) -> gr.Blocks:
    """The page of some folders and a model; nothing of them is opened yet."""
    with gr.Blocks(title="biomedclip", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as page:
        gr.HTML(_write_header(holdings), elem_id="bc-header")
        with gr.Tabs(elem_id="bc-tabs"):
            for name, add in zip(
                TABS, (add_classify_tab, add_search_tab, add_dataset_tab, add_reports_tab), strict=True
            ):
                with gr.Tab(name, id=name):
                    add(holdings, page)
    page.queue(default_concurrency_limit=1, max_size=32, api_open=False)
    return page


def make_theme() -> gr.themes.Base:
    """Gradio's plain theme in this project's colours, with the system's fonts."""
    return gr.themes.Base(
        primary_hue=_TEAL, secondary_hue=_TEAL, neutral_hue="slate", font=_FONT, font_mono=_MONO,
        radius_size="md", spacing_size="md", text_size="md",
    )  # fmt: skip


def _write_header(holdings: Holdings) -> str:
    name = Path(holdings.model).name if Path(holdings.model).is_dir() else holdings.model
    return (
        f'<header><b>biomedclip</b> <span class="bc-version">{to_text(__version__)}</span>'
        f'<span class="bc-model">model: {to_text(name)}</span>'
        f'<strong class="bc-research">{to_text(RESEARCH_ONLY)}</strong></header>'
    )
