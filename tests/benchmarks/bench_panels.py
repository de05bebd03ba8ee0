"""Panels: caption letters and panel boxes beside hand-checked figures of the bundled sample.

`tests/data/panels_truth.json` holds, read from the pictures by eye, the letters each caption names and the place of
each panel. Printed are precision and recall of the letters (all figures), of the boxes at IoU >= 0.5 (a box counts only
under its right letter), and of the panels that `split_figure_pair` would really cut at its default confidence. There is
no peer: the published splitters are neural detectors whose weights no registry ships.
"""

import json
import time
from importlib import resources
from pathlib import Path

import numpy as np

from biomedclip.images import read_rgb
from data_builders.pmc.jats import parse_article
from data_builders.pmc.media import resolve_graphic
from data_builders.pmc.panel_captions import split_caption
from data_builders.pmc.panels import MIN_CONFIDENCE, PanelBox, find_panels

PEERS = ()
ROOT = Path(__file__).parent.parent.parent
TRUTH = ROOT / "tests" / "data" / "panels_truth.json"
SAMPLE = Path(str(resources.files("data_builders"))) / "sample" / "pmc"


def overlap(box: PanelBox, truth: list[int], width: int, height: int) -> float:
    """Intersection over union; the truth is in thousandths of width and height."""
    left, top, right, bottom = (v * s / 1000 for v, s in zip(truth, (width, height, width, height), strict=True))
    inner = max(0, min(box.right, right) - max(box.left, left)) * max(0, min(box.bottom, bottom) - max(box.top, top))
    return inner / (box.width * box.height + (right - left) * (bottom - top) - inner)


def read_captions() -> dict[tuple[str, str], str]:
    """(article id, file) -> caption of every bundled figure."""
    captions = {}
    for folder in sorted(SAMPLE.glob("PMC*.*")):
        names = [path.name for path in folder.iterdir()]
        for figure in parse_article((folder / f"{folder.name}.xml").read_bytes(), article_id=folder.name).figures:
            name = resolve_graphic(figure.graphic, names, figure.alternatives)
            if name:
                captions[folder.name, name] = figure.caption
    return captions


def measure() -> dict[str, float]:
    """Precision and recall over the hand-checked figures that are bundled."""
    captions = read_captions()
    figures = [f for f in json.loads(TRUTH.read_text())["figures"] if (f["article"], f["file"]) in captions]
    letters = {"right": 0, "said": 0, "true": 0}
    boxes = {"right": 0, "said": 0, "true": 0}
    cut = {"right": 0, "said": 0, "true": 0}
    seconds, pictures = 0.0, 0
    for figure in figures:
        found = set(split_caption(captions[figure["article"], figure["file"]]).letters)
        truth = set(figure["letters"])
        letters["right"] += len(found & truth)
        letters["said"] += len(found)
        letters["true"] += len(truth)
        if "boxes" not in figure:
            continue
        picture = np.asarray(read_rgb((SAMPLE / figure["article"] / figure["file"]).read_bytes()))
        start = time.process_time()
        panels = find_panels(picture, sorted(found)) if len(found) > 1 else []
        seconds, pictures = seconds + time.process_time() - start, pictures + 1
        places = {letter: box for letter, box in figure["boxes"].items() if letter in truth} if len(truth) > 1 else {}
        height, width = picture.shape[:2]
        hits = [p for p in panels if p.letter in places and overlap(p, places[p.letter], width, height) >= 0.5]
        sure = len(panels) > 1 and min(p.confidence for p in panels) >= MIN_CONFIDENCE
        for counts, counted in ((boxes, True), (cut, sure)):
            counts["right"] += len(hits) if counted else 0
            counts["said"] += len(panels) if counted else 0
            counts["true"] += len(places)
    rates = {}
    for name, counts in (("letter", letters), ("panel", boxes), ("cut", cut)):
        rates[f"{name}_precision"] = round(counts["right"] / max(1, counts["said"]), 3)
        rates[f"{name}_recall"] = round(counts["right"] / max(1, counts["true"]), 3)
        rates[f"{name}s_true"] = counts["true"]
    return {"figures": len(figures), **rates, "pictures_per_s_core": round(pictures / max(seconds, 1e-9), 1)}


if __name__ == "__main__":
    print(json.dumps({"benchmark": "panels", "figures": measure()}))
