"""A build over real articles: equal bytes, exact resume, one ledger row a figure, one clear line for every mistake."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import data_builders
import data_builders.build as build_module
from biomedclip.config import config_file, load_config
from biomedclip.errors import ConfigError, DataError
from biomedclip.licences import PRESETS
from biomedclip.schema import Article, Drop, Pair
from biomedclip.shards import DatasetFolder, DatasetWriter, verify
from data_builders.build import BuildConfig, BuildInput, build, is_built, resolve_root

SAMPLE = Path(data_builders.__file__).parent / "sample" / "pmc"
FEW = ("PMC12419688.1", "PMC999000002.1", "PMC999000003.1", "PMC999000007.1", "PMC999000007.2", "PMC999000008.1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six article versions of the sample; small enough to be built in a fraction of a second."""
    root = tmp_path_factory.mktemp("bucket")
    for name in FEW:
        shutil.copytree(SAMPLE / name, root / name)
    return root


def config(root: Path | str, **changes: Any) -> BuildConfig:
    facts: dict[str, Any] = {
        "name": "few", "licence": "commercial-derivatives", "source": {"kind": "pmc", "root": str(root)},
        "shards": {"max_samples": 4},
    }  # fmt: skip
    return BuildConfig.model_validate(facts | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def reasons(folder: Path) -> dict[str, str]:
    rows = DatasetFolder(folder).ledger.to_pylist()
    return {f"{row['article_id']} {row['item']}": row["reason"] for row in rows if row["status"] == "dropped"}


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "few"
    build(config(source), out)
    return out


def test_a_build_is_complete_and_every_figure_is_counted_once(built: Path) -> None:
    assert verify(built) == []
    dataset = DatasetFolder(built)
    ledger = dataset.manifest["ledger"]
    assert ledger["seen"] == ledger["kept"] + sum(ledger["dropped"].values())
    assert ledger["dropped"] == {"superseded_version": 1}
    assert ledger["kept"] == len(dataset) == 10
    rows = dataset.ledger.to_pylist()
    assert len({(row["article_id"], row["item"], row["key"]) for row in rows}) == len(rows) == 11
    assert not list(built.glob(".*"))


def test_the_same_config_over_the_same_input_gives_the_same_bytes(built: Path, source: Path, tmp_path: Path) -> None:
    build(config(source), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(built)


def test_samples_are_the_original_files_and_articles_are_shuffled(built: Path, source: Path) -> None:
    samples = list(DatasetFolder(built).samples())
    for sample in samples:
        if "reencoded" not in sample.json.get("flags", []):
            original = source / sample.json["article_id"] / sample.json["file"]
            assert sample.image == original.read_bytes()
    order = [sample.json["article_id"] for sample in samples if sample.row["split"] == "train"]
    assert order != sorted(order)


def test_splits_never_share_an_article(source: Path, tmp_path: Path) -> None:
    source_facts = {"kind": "pmc", "root": str(source), "splits": {"val": 0.3, "test": 0.4, "seed": 1}}
    build(config(source, source=source_facts), tmp_path / "out")
    homes: dict[str, set[str]] = {}
    for row in DatasetFolder(tmp_path / "out").index.to_pylist():
        homes.setdefault(row["group_id"], set()).add(row["split"])
    assert {len(splits) for splits in homes.values()} == {1}
    assert len(set().union(*homes.values())) > 1


def test_another_shuffle_seed_gives_the_same_samples_in_another_order(
    built: Path, source: Path, tmp_path: Path
) -> None:
    build(config(source, shuffle_seed=1), tmp_path / "out")
    keys = [[s.key for s in DatasetFolder(folder).samples()] for folder in (built, tmp_path / "out")]
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1])


def test_the_manifest_says_what_was_built_from_what(built: Path, source: Path) -> None:
    provenance = DatasetFolder(built).manifest["provenance"]
    assert provenance["config"]["licence"] == "commercial-derivatives"
    assert provenance["config"]["source"]["languages"] == ["en"]
    assert len(provenance["config_sha256"]) == len(provenance["input_sha256"]) == 64
    assert provenance["articles"] == {"read": 5, "kept": 4}
    assert "National Library of Medicine" in provenance["notices"][0]
    card = (built / "README.md").read_text()
    assert provenance["notices"][0] in card
    assert "10.7554/eLife.43154" in card


def test_a_finished_build_is_returned_at_once(built: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    monkeypatch.setattr(build_module, "DatasetWriter", None)
    assert is_built(config(source), built)
    assert build(config(source), built) == DatasetFolder(built).manifest
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == before


def test_a_finished_dataset_of_another_config_or_input_is_left_alone(built: Path, source: Path, tmp_path: Path) -> None:
    before = contents(built)
    with pytest.raises(ConfigError, match=r"holds a finished dataset of another config.*; name another folder"):
        build(config(source, shuffle_seed=5), built)
    changed = tmp_path / "bucket"
    shutil.copytree(source, changed)
    shutil.rmtree(changed / FEW[0])
    bucket = tmp_path / "same-config"
    shutil.copytree(built, bucket)
    manifest = json.loads((bucket / "manifest.json").read_bytes())
    manifest["provenance"]["input_sha256"] = "0" * 64
    (bucket / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="holds a finished dataset of another input"):
        build(config(source), bucket)
    assert contents(built) == before


def test_other_peoples_files_are_never_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"holds other files \(found 00000\.tar\); name an empty or a new folder"):
        build(config(source), tmp_path)
    assert contents(tmp_path) == {"00000.tar": b"mine"}
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        build(config(source), tmp_path / "00000.tar")


def test_what_an_interrupted_build_of_another_config_left_is_replaced(
    built: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "finish", fail)
        with pytest.raises(KeyboardInterrupt):
            build(config(source, shards={"max_samples": 1}), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.tar"))) > len(list(built.glob("*.tar")))
    build(config(source), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(built)


def fail(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 1, 5, 9])
def test_a_build_that_fails_while_writing_gives_the_same_bytes_when_run_again(
    built: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole_add, calls = DatasetWriter.add, 0

    def add(self: DatasetWriter, item: Pair | Drop) -> None:
        nonlocal calls
        if isinstance(item, Pair):
            if calls == after:
                raise KeyboardInterrupt
            calls += 1
        whole_add(self, item)

    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "add", add)
        with pytest.raises(KeyboardInterrupt):
            build(config(source), tmp_path / "out")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert "manifest.json" not in left
    assert not any(name.startswith(".tmp-") for name in left)
    build(config(source), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(built)


@pytest.mark.fault
def test_a_build_killed_at_any_moment_gives_the_same_bytes_when_run_again(
    built: Path, source: Path, tmp_path: Path
) -> None:
    program = (
        "import sys, json; from data_builders.build import BuildConfig, build;"
        "build(BuildConfig.model_validate_json(sys.argv[1]), sys.argv[2])"
    )
    command = [sys.executable, "-c", program, config(source).model_dump_json(), str(tmp_path / "out")]
    start = time.monotonic()
    subprocess.run([*command[:-1], str(tmp_path / "timed")], check=True)
    whole = time.monotonic() - start
    assert contents(tmp_path / "timed") == contents(built)
    killed = 0
    for step in range(12):
        process = subprocess.Popen(command)
        try:
            # Most of the time goes into imports: the later two thirds are where files are written.
            process.wait(timeout=whole * (0.35 + 0.055 * step))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
    assert killed >= 3
    subprocess.run(command, check=True)
    assert contents(tmp_path / "out") == contents(built)


Damage = Callable[[Path], None]


def rewrite(root: Path, article_id: str, **changes: Any) -> None:
    path = root / article_id / f"{article_id}.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def replace_file(root: Path, article_id: str, name: str, data: bytes, *, honest: bool = True) -> None:
    path = root / article_id / name
    before = hashlib.md5(path.read_bytes()).hexdigest()
    path.write_bytes(data)
    if honest:
        metadata = root / article_id / f"{article_id}.json"
        metadata.write_text(metadata.read_text().replace(before, hashlib.md5(data).hexdigest()))


THREE = "PMC999000003.1"


def cut_image(root: Path) -> None:
    replace_file(root, THREE, "fig1.jpg", (root / THREE / "fig1.jpg").read_bytes()[:9000])


def swap_image(root: Path) -> None:
    replace_file(root, THREE, "fig1.jpg", (root / THREE / "fig2.jpg").read_bytes(), honest=False)


def double_image(root: Path) -> None:
    replace_file(root, THREE, "fig2.jpg", (root / THREE / "fig1.jpg").read_bytes())


def remove_caption(root: Path) -> None:
    xml = (root / THREE / f"{THREE}.xml").read_bytes()
    start = xml.index(b"<caption>", xml.index(b'<fig id="fig1"'))
    end = xml.index(b"</caption>", start) + len(b"</caption>")
    replace_file(root, THREE, f"{THREE}.xml", xml[:start] + xml[end:])


def remove_licence(root: Path) -> None:
    xml = (root / THREE / f"{THREE}.xml").read_bytes()
    start, end = xml.index(b"<permissions>"), xml.index(b"</permissions>")
    replace_file(root, THREE, f"{THREE}.xml", xml[:start] + b"<permissions>" + xml[end:])
    rewrite(root, THREE, license_code=None)


def plant_bomb(root: Path) -> None:
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    bomb = f'<!DOCTYPE article [<!ENTITY e0 "ha">{entities}]><article><front>&e11;</front></article>'
    replace_file(root, THREE, f"{THREE}.xml", bomb.encode())


def break_metadata(root: Path) -> None:
    (root / THREE / f"{THREE}.json").write_bytes(b'{"pmcid": ')


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut_image, {"fig1": "broken_image"}),
        (swap_image, {"fig1": "md5_mismatch"}),
        (double_image, {"fig2": "duplicate_image"}),
        (remove_caption, {"fig1": "no_caption"}),
        (remove_licence, {"fig1": "no_licence", "fig2": "no_licence", "respfig1": "no_licence"}),
        (plant_bomb, {THREE: "xml_hostile"}),
        (break_metadata, {THREE: "metadata_error"}),
    ],
)
def test_bad_input_is_a_row_of_the_ledger_and_the_rest_is_built(
    source: Path, tmp_path: Path, damage: Damage, expected: dict[str, str]
) -> None:
    shutil.copytree(source, tmp_path / "bucket")
    damage(tmp_path / "bucket")
    build(config(tmp_path / "bucket"), tmp_path / "out")
    found = reasons(tmp_path / "out")
    assert found.pop("PMC999000007.1 PMC999000007.1") == "superseded_version"
    assert found == {f"{THREE} {item}": reason for item, reason in expected.items()}
    assert DatasetFolder(tmp_path / "out").manifest["ledger"]["kept"] == 10 - (
        len(expected) if THREE not in expected else 3
    )
    assert verify(tmp_path / "out") == []


def test_a_labelled_set_is_built_by_the_same_rules(tmp_path: Path) -> None:
    labels = {"kind": "labels", "root": "sample://bccd", "recipe": "bccd", "splits": ["val"]}
    for out in ("one", "two"):
        manifest = build(config("", source=labels, licence="commercial"), tmp_path / out)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert verify(tmp_path / "one") == []
    assert manifest["ledger"] == {"seen": 214, "kept": 214, "dropped": {}}
    assert (manifest["licences"], manifest["sources"]) == ({"MIT": 214}, {"bccd": 214})
    assert "articles" not in manifest["provenance"]
    assert "notices" not in manifest["provenance"]
    card = (tmp_path / "one" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == ["mit"]
    assert "https://github.com/Shenggan/BCCD_Dataset" in card
    with pytest.raises(ConfigError, match="holds a finished dataset of another config"):
        build(config("", source=labels | {"splits": ["test"]}, licence="commercial"), tmp_path / "one")


def test_no_image_is_kept_whose_licence_the_preset_does_not_admit_whatever_the_source_says(
    source: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row, *_), folder = DatasetFolder(built).index.to_pylist(), DatasetFolder(built)
    image = folder.read(row).image

    def items(advance: Callable[[], None]) -> Iterator[Article | Pair | Drop]:
        for number, licence in enumerate(("CC BY-NC", "", "CC BY")):
            yield Pair(
                key=f"k{number}", image=image, image_format="jpg", width=9, height=9, caption="c", source="pmc",
                licence=licence, sha256=row["sha256"], phash=0,
            )  # fmt: skip

    stub = BuildInput(fingerprint="0", total=3, items=items)
    monkeypatch.setattr(build_module, "open_input", lambda config, **_: stub)
    build(config(source), tmp_path / "out")
    dataset = DatasetFolder(tmp_path / "out")
    assert [(r["item"], r["reason"]) for r in dataset.ledger.to_pylist()] == [
        ("k0", "licence_not_allowed"), ("k1", "licence_not_allowed"), ("k2", None),
    ]  # fmt: skip


def test_nothing_kept_and_too_much_dropped_are_errors_that_say_why(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 11 figures or images can be kept \(found image_too_small 10"):
        build(config(source, filters={"min_side_px": 5000}), tmp_path / "none")
    with pytest.raises(DataError, match=r"9\.1% is dropped, max_drop_rate allows 5\.0% \(found superseded_version 1\)"):
        build(config(source, max_drop_rate=0.05), tmp_path / "rate")
    assert not (tmp_path / "rate" / "manifest.json").exists()
    build(config(source, max_drop_rate=0.1), tmp_path / "allowed")


def test_progress_is_reported_for_every_article_and_every_sample(source: Path, tmp_path: Path) -> None:
    from contextlib import contextmanager

    seen: dict[str, list[int | None]] = {}

    @contextmanager
    def progress(description: str, total: int | None = None) -> Iterator[Any]:
        seen[description] = [total, 0]

        def advance(steps: int = 1, note: str = "") -> None:
            seen[description][1] += steps  # type: ignore[operator]

        yield advance

    build(config(source), tmp_path / "out", progress=progress)
    assert seen == {"reading articles": [6, 6], "writing shards": [10, 10]}


def test_the_sample_has_a_name_that_works_wherever_the_project_is_installed(tmp_path: Path) -> None:
    assert resolve_root("sample://pmc") == SAMPLE
    assert resolve_root(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match=r"sample://pmx: is not in the sample data; use one of .*sample://pmc"):
        resolve_root("sample://pmx")
    with pytest.raises(ConfigError, match="is not in the sample data"):
        resolve_root("sample://../pmc")


def test_a_missing_source_is_one_line_and_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder; name a copy of the PMC Cloud Service bucket"):
        build(config(tmp_path / "nowhere"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_presets_of_the_config_are_those_of_the_licences() -> None:
    assert set(typing.get_args(BuildConfig.model_fields["licence"].annotation)) == set(PRESETS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nsource: {kind: pmc, root: r}\n", "licence: is missing; add it"),
        ("name: x\nlicense: all\nlicence: all\nsource: {kind: pmc, root: r}\n", "did you mean 'licence'"),
        ("name: x\nlicence: comercial\nsource: {kind: pmc, root: r}\n", "did you mean 'commercial'"),
        ("name: x\nlicence: all\nsource: {kind: pmc, root: r, langages: [en]}\n", "did you mean 'languages'"),
        ("name: x\nlicence: all\nsource: {kind: pcm, root: r}\n", "source"),
        ("name: x\nlicence: all\nsource: {kind: pmc, root: r}\nfilters: {min_side_px: small}\n", "filters.min_side_px"),
        ("name: X Y\nlicence: all\nsource: {kind: pmc, root: r}\n", "name: "),
    ],
)
def test_a_typo_in_a_config_is_one_line_that_helps(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "build.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, BuildConfig)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_the_demo_config_loads_and_is_headed_by_command_hardware_time_and_result() -> None:
    path = config_file("build/demo_pmc.yaml")
    loaded = load_config(path, BuildConfig)
    assert loaded.source.root == "sample://pmc"
    head = [line.split(":")[0] for line in path.read_text().splitlines()[:4]]
    assert head == ["# command", "# hardware", "# time", "# expected"]
    assert yaml.safe_load(path.read_text())["name"] == loaded.name
