"""The PMC builder: extraction beside pubmed_parser, packages to shards, two workers, memory, a whole plan, panels.

    make bench NAME=pmc

Extraction reads real articles (`../shared/data/jats_xml.tar.gz`, else the bundled ones, which is said) in rounds that
alternate with the peer's, each in its own process, by CPU time; the ratio is the median of the rounds' ratios. Three
rates are printed: `articles_per_s_core`, complete records (captions, groups, rights, mentions with panels, article
facts, licence); `figures_only`, figures with captions and graphics, which is what the peer extracts; and the peer's.
Which captions survive is counted over every `<fig>` that has one: kept where its whole text, of letters and digits, is
contained in some caption of that article; truncated where the caption that comes nearest is more than 10 % shorter.

Packages are tar.gz as PMC had them: real ones of the shared data, and made-up ones of ten 138 kB JPEGs of 800 pixels,
streamed through `article_pairs` (full decode, perceptual hash, sha256) into a finished dataset folder. Environment:
`BENCH_ROWS` (plan, 8,000,000), `BENCH_ARTICLES` (memory, 50,000), `BENCH_PARTS` (such as `extraction,packages`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_panels
import bench_pmc_plan
import numpy as np
from lxml import etree
from PIL import Image

from biomedclip.schema import Article, Drop, Pair
from biomedclip.shards import DatasetWriter
from data_builders.engines import run_tasks
from data_builders.pmc.catalog import ArticleRecord, SourceFile
from data_builders.pmc.figures import find_figures, survey_article
from data_builders.pmc.harvest import harvest
from data_builders.pmc.jats import BadXml, parse_article
from data_builders.pmc.pairs import PmcConfig, article_pairs
from data_builders.pmc.plan import plan_source
from data_builders.pmc.plan_rules import PlanConfig
from data_builders.pmc.sources import OaPackages
from data_builders.pmc.xml_input import read_article_element
from data_builders.units import unit_name, write_unit

PEERS = ("pubmed_parser==0.5.1",)
ROOT = Path(__file__).parent.parent.parent
SHARED = ROOT.parent / "shared" / "data"
SAMPLE = ROOT / "data_builders" / "sample" / "pmc"
ROWS = int(os.environ.get("BENCH_ROWS", "8000000"))
ARTICLES = int(os.environ.get("BENCH_ARTICLES", "50000"))
PARTS = os.environ.get("BENCH_PARTS", "extraction,packages,scaling,memory,plan,panels").split(",")
ROUNDS = 7

PEER = """
import json, os, sys, time
import pubmed_parser
paths = sys.argv[1:]
out, sys.stdout = os.fdopen(os.dup(1), "w"), open(os.devnull, "w")  # it prints of files that it cannot read
for line in sys.stdin:
    found, start = {}, time.process_time()
    for path in paths:
        try:
            found[path] = pubmed_parser.parse_pubmed_caption(path) or []
        except Exception as error:
            found[path] = None
    seconds = time.process_time() - start
    captions = {k: None if v is None else [[f["fig_id"], f["fig_caption"]] for f in v] for k, v in found.items()}
    out.write(json.dumps({"s": seconds, "captions": captions if line.strip() == "captions" else None}) + "\\n")
    out.flush()
"""

Captions = dict[str, list[tuple[str, str]] | None]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- extraction -------------------------------------------------------------------------------------------------


def unpack_articles(folder: Path) -> list[Path]:
    """The XML files to read: 298 real ones, else those that are bundled."""
    archive = SHARED / "jats_xml.tar.gz"
    if not archive.exists():
        say(f"{archive} is missing: the bundled articles are read instead")
        return sorted(SAMPLE.glob("PMC*/*.xml"))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return sorted(path for path in folder.rglob("*") if path.suffix in (".xml", ".nxml"))


def read_completely(paths: list[Path]) -> float:
    """CPU seconds to read every article to complete figure records, files included."""
    start = time.process_time()
    for path in paths:
        with contextlib.suppress(BadXml):
            parse_article(path.read_bytes(), article_id="PMC1.1")
    return time.process_time() - start


def read_figures(paths: list[Path]) -> float:
    """CPU seconds to read the figures alone, with captions, groups, graphics, languages and rights."""
    start = time.process_time()
    for path in paths:
        try:
            element, _ = read_article_element(path.read_bytes())
        except BadXml:
            continue
        find_figures(survey_article(element), frozenset())
    return time.process_time() - start


def our_captions(paths: list[Path]) -> Captions:
    """Path -> (figure id, caption) of every figure, as `parse_article` gives them."""
    found: Captions = {}
    for path in paths:
        try:
            figures = parse_article(path.read_bytes(), article_id="PMC1.1").figures
        except BadXml:
            found[str(path)] = None
        else:
            found[str(path)] = [(figure.figure_id, figure.caption) for figure in figures]
    return found


_NO_CAPTION = ("object-id", "tex-math", "supplementary-material", "media", "permissions", "attrib", "alt-text",
               "long-desc", "graphic", "inline-graphic", "label")  # fmt: skip


def squeeze(text: str) -> str:
    """Letters and digits alone: spacing, carets and dashes are a matter of taste."""
    return re.sub(r"[\W_]+", "", text.lower())


def true_captions(path: Path) -> Iterator[tuple[str, str, str]]:
    """(id, text, text without ids, attributions, files and TeX source) of every figure that has a caption."""
    root = etree.fromstring(path.read_bytes(), etree.XMLParser(recover=True, resolve_entities=False, huge_tree=True))
    for figure in root.iter("{*}fig"):
        captions = [node for node in figure if etree.QName(node).localname == "caption"] if len(figure) else []
        whole = squeeze(" ".join("".join(node.itertext()) for node in captions))
        for node in captions:
            for part in [x for x in node.iter("{*}*") if etree.QName(x).localname in _NO_CAPTION]:
                if part.getparent() is not None:
                    part.tail, tail = None, part.tail
                    before = part.getprevious()
                    if before is not None:
                        before.tail = (before.tail or "") + (tail or "")
                    else:
                        part.getparent().text = (part.getparent().text or "") + (tail or "")
                    part.getparent().remove(part)
        text = squeeze(" ".join("".join(node.itertext()) for node in captions))
        if text:
            yield figure.get("id") or "", whole, text


def judge_captions(paths: list[Path], found: Captions) -> Counter[str]:
    """How many captions are kept, altered (10 % shorter at most), truncated, or lost with their figure or article."""
    verdicts: Counter[str] = Counter()
    for path in paths:
        captions = found.get(str(path))
        squeezed = [(figure_id, squeeze(caption)) for figure_id, caption in captions or ()]
        for figure_id, whole, text in true_captions(path):
            if any(text in caption or whole in caption for _, caption in squeezed):
                verdicts["kept"] += 1
                continue
            mine = [caption for name, caption in squeezed if name.partition("@")[0] == figure_id and caption]
            longest = max(map(len, mine), default=0)
            verdicts["lost" if not longest else "truncated" if longest < 0.9 * len(text) else "altered"] += 1
    return verdicts


def serve() -> None:
    """Read the articles named on the command line each time a line asks for it; answer with CPU seconds."""
    paths, readers = list(map(Path, sys.argv[1:])), {"complete": read_completely, "figures": read_figures}
    for line in sys.stdin:
        print(json.dumps({"s": readers[line.strip()](paths)}), flush=True)


class Reader:
    """A process that reads the articles when asked, so that neither side pays for what the other keeps in memory."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> dict[str, Any]:
        self.process.stdin.write(what + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return json.loads(self.process.stdout.readline())  # type: ignore[union-attr]

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def measure_extraction(folder: Path) -> dict[str, Any]:
    """Rates and kept captions of both."""
    paths = unpack_articles(folder)
    names = list(map(str, paths))
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench_pmc; bench_pmc.serve()"
    ours, peer = Reader(sys.executable, "-c", code, *names), Reader(os.environ["PEER_PYTHON"], "-c", PEER, *names)
    rates: dict[str, list[float]] = {"complete": [], "figures": [], "peer": []}
    theirs = peer.ask("captions")["captions"]
    ours.ask("complete")
    for _ in range(ROUNDS):
        rates["complete"].append(len(paths) / ours.ask("complete")["s"])
        rates["peer"].append(len(paths) / peer.ask("time")["s"])
        rates["figures"].append(len(paths) / ours.ask("figures")["s"])
    ours.close()
    peer.close()
    mine = our_captions(paths)
    verdicts = {"": judge_captions(paths, mine), "_pubmed_parser": judge_captions(paths, theirs)}
    for suffix, verdict in verdicts.items():
        counts = ", ".join(f"{k} {verdict[k]}" for k in ("kept", "altered", "truncated", "lost"))
        say(f"captions{suffix or '_biomedclip'}: {counts}")
    total = max(1, sum(verdicts[""].values()))
    median = {name: statistics.median(values) for name, values in rates.items()}
    pairs = list(zip(rates["complete"], rates["figures"], rates["peer"], strict=True))
    return {
        "articles": len(paths), "captions": total,
        "articles_per_s_core": round(median["complete"], 1),
        "figures_only_per_s_core": round(median["figures"], 1),
        "pubmed_parser_per_s_core": round(median["peer"], 1),
        "vs_pubmed_parser": round(statistics.median(complete / peer for complete, _, peer in pairs), 2),
        "figures_only_vs_pubmed_parser": round(statistics.median(figures / peer for _, figures, peer in pairs), 2),
        **{
            f"captions_{kind}_pct{suffix}": round(100 * verdict[kind] / total, 1)
            for suffix, verdict in verdicts.items()
            for kind in ("kept", "altered", "truncated", "lost")
        },
        "articles_lost": sum(found is None for found in mine.values()),
        "articles_lost_pubmed_parser": sum(found is None for found in theirs.values()),
    }  # fmt: skip


# --- packages ---------------------------------------------------------------------------------------------------


def make_jpeg(seed: int) -> bytes:
    """A made-up JPEG of 800 x 600, about 138 kB: smooth shapes with the noise of a photograph."""
    dice = np.random.default_rng(seed)
    shapes = Image.fromarray(dice.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((800, 600), 3)
    noisy = np.clip(np.asarray(shapes) + dice.normal(0, 7, (600, 800, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


CC_BY = "https://creativecommons.org/licenses/by/4.0/"
FRONT = (
    "<front><article-meta><title-group><article-title>T</article-title></title-group>"
    f'<permissions><license x:href="{CC_BY}"/></permissions></article-meta></front>'
)


def make_article(number: int, figures: int, filler: int) -> bytes:
    """An article with that many figures, each cited twice, and so many paragraphs of prose."""
    prose = (
        "<p>" + "Cells grew <italic>in vitro</italic> at 10<sup>4</sup> a day (<xref rid='B1'>1</xref>). " * 8 + "</p>"
    )
    figs = "".join(
        f'<fig id="F{n}"><label>Figure {n}</label><caption><title>Growth {number}.</title><p>(A) Control. (B) Treated '
        f'cells of line {n}, scale bar 10 µm. {"More words. " * 20}</p></caption><graphic x:href="f{n}.jpg"/></fig>'
        for n in range(figures)
    )
    cites = "".join(f'<p>As shown (<xref rid="F{n}">Fig. {n}A</xref>), it grew.</p>' * 2 for n in range(figures))
    return (
        f'<article xmlns:x="http://www.w3.org/1999/xlink" xml:lang="en">{FRONT}<body><sec><title>Results</title>'
        f"{cites}{prose * filler}{figs}</sec></body></article>"
    ).encode()


def write_package(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{path.name.partition('.')[0]}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_made_up_packages(folder: Path, articles: int, figures: int = 10) -> None:
    pictures = [make_jpeg(seed) for seed in range(40)]
    for number in range(articles):
        media = {f"f{n}.jpg": pictures[(number * figures + n) % len(pictures)] for n in range(figures)}
        write_package(folder / f"PMC{1000 + number}.tar.gz", {"a.nxml": make_article(number, figures, 60), **media})


def write_real_packages(folder: Path) -> bool:
    """Packages of the shared data, else of the bundled articles; whether they are the shared ones."""
    shared = SHARED / "pmc_packages"
    if not shared.exists():
        say(f"{shared} is missing: the bundled articles are packed instead")
    source = shared if shared.exists() else SAMPLE
    for number, article in enumerate(sorted(path for path in source.iterdir() if path.is_dir())):
        files = {
            path.name.removesuffix(".jats") + (".nxml" if path.suffix == ".jats" else ""): path.read_bytes()
            for path in sorted(article.iterdir())
            if path.suffix != ".json"
        }
        write_package(folder / f"PMC{2000 + number}.tar.gz", files)
    return shared.exists()


def pack(packages: Path, out: Path) -> dict[str, Any]:
    """Packages to a finished dataset folder through the builder's own code: CPU seconds, pairs, megabytes."""
    start, articles, images = time.process_time(), 0, 0
    source, config = OaPackages(packages), PmcConfig(root=str(packages), languages=None)
    dropped: Counter[str] = Counter()
    facts = []
    with DatasetWriter(out, name="bench") as writer:
        for record in source.records():
            items = [record] if isinstance(record, Drop) else article_pairs(record, source, config, preset="all")
            for item in items:
                if isinstance(item, Article):
                    articles += 1
                    facts.append(item)
                    continue
                writer.add(item)
                if isinstance(item, Pair):
                    images += len(item.image)
                else:
                    dropped[item.reason] += 1
        manifest = writer.finish(articles=facts, provenance={}, card=lambda manifest: "# bench\n")
    seconds, pairs = time.process_time() - start, manifest["samples"]
    say(f"{packages.name}: {articles} articles, {pairs} pairs, {images / 1e6:.0f} MB of pictures, dropped {dropped}")
    return {"pairs_per_s": pairs / seconds, "articles_per_s": articles / seconds, "mb_per_s": images / 1e6 / seconds,
            "kb": images / max(1, pairs) / 1e3}  # fmt: skip


def measure_packages(folder: Path) -> dict[str, Any]:
    """Rates over made-up packages (the medians of five rounds) and real ones (three)."""
    made_up, real = folder / "made_up", folder / "real"
    made_up.mkdir()
    real.mkdir()
    write_made_up_packages(made_up, 30)
    shared = write_real_packages(real)
    rounds = [pack(made_up, folder / f"out-{n}") for n in range(5)]
    others = [pack(real, folder / f"real-{n}") for n in range(3)]

    def median(name: str, of: list[dict[str, Any]]) -> float:
        return round(statistics.median(one[name] for one in of), 1)

    return {
        "pairs_per_s_core": median("pairs_per_s", rounds), "packages_per_s_core": median("articles_per_s", rounds),
        "mb_per_s_core": median("mb_per_s", rounds), "kb_per_picture": median("kb", rounds),
        "real_pairs_per_s_core": median("pairs_per_s", others), "real_mb_per_s_core": median("mb_per_s", others),
        "real_kb_per_picture": median("kb", others), "real_packages": "shared" if shared else "bundled",
    }  # fmt: skip


# --- memory -----------------------------------------------------------------------------------------------------


class MadeUpSource:
    """Articles of one figure each, made when they are asked for."""

    def __init__(self, start: int, stop: int) -> None:
        self.range = range(start, stop)
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
        self.picture = buffer.getvalue()

    def records(self) -> Iterator[ArticleRecord]:
        for n in self.range:
            name = f"PMC{n + 1}.1"
            yield ArticleRecord(article_id=name, pmcid=n + 1, version=1, licence="CC BY", doi=f"10.1/{n}",
                                xml=SourceFile(f"{name}/{name}.xml", None),
                                media=(SourceFile(f"{name}/f0.jpg", None),))  # fmt: skip

    def read(self, file: SourceFile) -> bytes:
        if file.key.endswith(".jpg"):
            return self.picture
        return make_article(int(file.key[3 : file.key.index(".")]), 1, 2)


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def stream_articles(folder: Path, articles: int, unit: int = 1_000) -> dict[str, Any]:
    """Resident memory after each unit of made-up articles, written by the harvest's own writer and then deleted."""
    config, sizes = PmcConfig(root="x"), []
    start = time.process_time()
    for number in range(articles // unit):
        source = MadeUpSource(number * unit, (number + 1) * unit)
        items = (item for record in source.records() for item in article_pairs(record, source, config, preset="all"))
        record = write_unit(folder, unit_name(number), items, identity={})
        assert record.kept == unit, record
        for path in folder.iterdir():
            path.unlink()
        sizes.append(resident_bytes())
    settled = sizes[len(sizes) // 5 :]
    slope = np.polyfit(np.arange(len(settled)) * unit, settled, 1)[0] if len(settled) > 1 else 0.0
    return {"memory_slope_bytes_per_article": round(float(slope), 1), "memory_articles": articles,
            "memory_growth_mb": round((settled[-1] - settled[0]) / 1e6, 1), "memory_mb": round(max(sizes) / 1e6),
            "small_articles_per_s_core": round(articles / (time.process_time() - start))}  # fmt: skip


def measure_memory(folder: Path) -> dict[str, Any]:
    """`stream_articles` in a process of its own."""
    code = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench_pmc, pathlib;"
        f" print(json.dumps(bench_pmc.stream_articles(pathlib.Path({str(folder / 'units')!r}), {ARTICLES})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# --- scaling ----------------------------------------------------------------------------------------------------


def keep_busy(seconds: float) -> float:
    """Loops a second of a task that shares nothing with anybody."""
    end, loops = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        sum(range(10_000))
        loops += 1
    return loops / seconds


def measure_scaling(folder: Path) -> dict[str, Any]:
    """Wall time of one harvest with one worker and with two, in turn; starting the second process included.

    `control_2w` is what two busy loops get done beside what one does: 2 on two idle cores, 1 where somebody else keeps
    one of them busy, and then no builder can scale.
    """
    packages, units, unit_size = folder / "packages", 16, 30
    packages.mkdir()
    write_made_up_packages(packages, unit_size)
    for number in range(unit_size, units * unit_size):  # the same files under other names
        os.link(packages / f"PMC{1000 + number % unit_size}.tar.gz", packages / f"PMC{1000 + number}.tar.gz")
    config = PlanConfig(licence="commercial", unstated_licence="ask_xml", unit_size=unit_size)
    plan_source(str(packages), folder / "plan.parquet", config)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(3):
        for workers in (1, 2):
            out = folder / f"out-{turn}-{workers}"
            start = time.perf_counter()
            facts = harvest(folder / "plan.parquet", str(packages), out, workers=workers)
            seconds[workers].append(time.perf_counter() - start)
            assert facts.kept == units * unit_size * 10, facts
            shutil.rmtree(out)
    alone, both = (sum(run_tasks(keep_busy, [3.0] * workers, workers=workers)) for workers in (1, 2))
    ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    return {
        "scaling_2w": round(statistics.median(ratios), 2), "control_2w": round(both / alone, 2),
        "pairs_per_s_1w": round(facts.kept / statistics.median(seconds[1]), 1),
        "pairs_per_s_2w": round(facts.kept / statistics.median(seconds[2]), 1),
    }  # fmt: skip


# --- all --------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the parts and print one JSON line."""
    figures: dict[str, Any] = {}
    parts = {
        "extraction": measure_extraction, "packages": measure_packages, "scaling": measure_scaling,
        "memory": measure_memory,
    }  # fmt: skip
    for name, measure in parts.items():
        if name in PARTS:
            say(f"measuring {name}")
            with tempfile.TemporaryDirectory() as folder:
                figures |= measure(Path(folder))
    if "plan" in PARTS:
        say("measuring plan")
        plan = bench_pmc_plan.measure_all(ROWS)
        figures |= {
            "plan_rows": plan["rows"],
            **{k: v for k, v in plan.items() if k.startswith(("plan_8m", "diff_8m"))},
        }
    if "panels" in PARTS:
        say("measuring panels")
        panels = bench_panels.measure()
        wanted = ("panel", "cut", "letter", "pictures_per_s")
        figures |= {name: value for name, value in panels.items() if name.startswith(wanted)}
    print(json.dumps({"benchmark": "pmc", "figures": figures}))


if __name__ == "__main__":
    main()
