"""MeSH terms reach the article whose PMID they carry, whatever PubMed's answer leaves out, adds or takes back."""

from __future__ import annotations

import gzip
import pickle
import tracemalloc
from pathlib import Path

import pytest
from command_line import run_command

from biomedclip.errors import DataError
from data_builders.pmc import mesh, mesh_terms
from data_builders.pmc.mesh import write_mesh
from data_builders.pmc.mesh_terms import Mesh, read_mesh_terms

HEAD = (
    '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle, 1st January '
    '2025//EN" "https://dtd.nlm.nih.gov/ncbi/pubmed/out/pubmed_250101.dtd">\n'
)


def citation(pmid: object, *headings: str, version: int = 1, more: str = "") -> str:
    """A citation; a heading is `Name`, `Name*` (major) or `Name/qualifier*` (major by its qualifier)."""
    parts = []
    for heading in headings:
        name, _, qualifier = heading.partition("/")
        major = "Y" if name.endswith("*") else "N"
        part = f'<DescriptorName UI="D1" MajorTopicYN="{major}">{name.rstrip("*")}</DescriptorName>'
        if qualifier:
            major = "Y" if qualifier.endswith("*") else "N"
            part += f'<QualifierName UI="Q1" MajorTopicYN="{major}">{qualifier.rstrip("*")}</QualifierName>'
        parts.append(f"<MeshHeading>{part}</MeshHeading>")
    listed = f"<MeshHeadingList>{''.join(parts)}</MeshHeadingList>" if parts else ""
    return (
        f'<PubmedArticle><MedlineCitation Status="MEDLINE"><PMID Version="{version}">{pmid}</PMID>{more}{listed}'
        "</MedlineCitation><PubmedData><ArticleIdList/></PubmedData></PubmedArticle>"
    )


def write(path: Path, *parts: str) -> Path:
    data = f"{HEAD}<PubmedArticleSet>\n{''.join(parts)}\n</PubmedArticleSet>".encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def test_terms_and_major_topics_are_read_in_order(tmp_path):
    comment = (
        "<CommentsCorrectionsList><CommentsCorrections><PMID>999</PMID></CommentsCorrections></CommentsCorrectionsList>"
    )
    path = write(
        tmp_path / "a.xml.gz",
        citation(20, "Humans", "Carcinoma, Hepatocellular/pathology*", "Tomography, X-Ray Computed*", "Humans"),
        citation(10, more=comment),
        "<PubmedBookArticle><BookDocument><PMID>77</PMID></BookDocument></PubmedBookArticle>",
    )
    facts = write_mesh([path], tmp_path / "mesh.parquet")
    table = read_mesh_terms(tmp_path / "mesh.parquet")
    cancer, ct = "Carcinoma, Hepatocellular", "Tomography, X-Ray Computed"
    assert table[20] == Mesh(("Humans", cancer, ct), (cancer, ct))
    assert table[10] == Mesh((), ())
    assert [pmid in table for pmid in (10, 20, 77, 999, 15, 21, 1)] == [True, True, *[False] * 5]
    assert table.get(None) is None
    assert (len(table), facts.citations, facts.articles) == (2, 2, 2)
    with pytest.raises(KeyError):
        table[77]


def test_a_pmid_missing_from_an_answer_shifts_nobody(tmp_path):
    """An efetch answer for 111, 222, 333, 444 without 222: joined by position, 333 would get the terms of 444."""
    asked = [111, 222, 333, 444]
    answer = write(tmp_path / "a.xml", *(citation(p, f"Term {p}") for p in asked if p != 222))
    write_mesh([answer], tmp_path / "mesh.parquet")
    table = read_mesh_terms(tmp_path / "mesh.parquet")
    found = {pmid: table.get(pmid) for pmid in asked}
    assert {pmid: terms and terms.terms for pmid, terms in found.items()} == {
        111: ("Term 111",), 222: None, 333: ("Term 333",), 444: ("Term 444",)
    }  # fmt: skip


def test_later_files_win_and_deleted_citations_are_gone(tmp_path):
    deleted = "<DeleteCitation>\n<PMID Version='1'>2</PMID><PMID Version='1'>3</PMID></DeleteCitation>"
    first = write(tmp_path / "1.xml.gz", citation(1, "Old"), citation(2, "Old"), citation(3, "Old"))
    second = write(tmp_path / "2.xml.gz", citation(1, "New", "Newer"), deleted)
    third = write(tmp_path / "3.xml", citation(3, "Back"))
    facts = write_mesh([first, second, third], tmp_path / "mesh.parquet")
    table = read_mesh_terms(tmp_path / "mesh.parquet")
    assert {p: (t := table.get(p)) and t.terms for p in (1, 2, 3)} == {1: ("New", "Newer"), 2: None, 3: ("Back",)}
    assert (facts.files, facts.citations, facts.deleted, facts.articles) == (3, 5, 2, 2)
    write_mesh([second, first], tmp_path / "reversed.parquet")
    assert read_mesh_terms(tmp_path / "reversed.parquet")[1].terms == ("Old",)


def test_the_highest_version_of_one_file_wins_and_a_citation_without_pmid_is_counted(tmp_path):
    path = write(tmp_path / "a.xml", citation(1, "Two", version=2), citation(1, "One"), citation("x", "Lost"))
    facts = write_mesh([path], tmp_path / "mesh.parquet")
    assert read_mesh_terms(tmp_path / "mesh.parquet")[1].terms == ("Two",)
    assert (facts.without_pmid, facts.citations, facts.articles) == (1, 3, 1)


def test_every_pmid_is_found_across_row_groups_and_in_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(mesh, "_GROUP_ROWS", 7)
    monkeypatch.setattr(mesh_terms, "CACHED_ROWS", 15)
    pmids = [n * 3 for n in range(100, 0, -1)]
    write_mesh([write(tmp_path / "a.xml", *(citation(p, f"T{p}") for p in pmids))], tmp_path / "mesh.parquet")
    table = pickle.loads(pickle.dumps(read_mesh_terms(tmp_path / "mesh.parquet")))
    assert [p for p in range(1, 310) if p in table] == sorted(pmids)
    assert all(table[p].terms == (f"T{p}",) for p in pmids)


def test_the_same_files_give_the_same_bytes(tmp_path):
    path = write(tmp_path / "a.xml", *(citation(p, f"T{p % 7}") for p in range(1, 12_000)))
    for name in ("a.parquet", "b.parquet"):
        write_mesh([path], tmp_path / name)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


HOSTILE = {
    "entities": (b'<!DOCTYPE x [<!ENTITY a "b">]><PubmedArticleSet/>', "declares entities"),
    "utf-16": ("<!DOCTYPE x [<!ENTITY a 'b'>]><PubmedArticleSet/>".encode("utf-16"), "encoding that PubMed"),
    "declared": (b'<?xml version="1.0" encoding="utf-7"?><PubmedArticleSet/>', "encoding that PubMed"),
    "not xml": (b"Service unavailable", "cannot be read as PubMed's XML"),
    "empty": (b"", "cannot be read as PubMed's XML"),
    "efetch error": (
        b"<eFetchResult><ERROR>no</ERROR></eFetchResult>",
        r"is no PubmedArticleSet \(found <eFetchResult",
    ),
    "cut off": (f"<PubmedArticleSet>{citation(1, 'A')}".encode(), "cannot be read as PubMed's XML"),
    "cut gzip": (gzip.compress(b"<PubmedArticleSet>" + b"x" * 5000)[:40], "cannot be read as PubMed's XML"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_cannot_be_trusted_is_one_line_and_no_table(tmp_path, name):
    data, message = HOSTILE[name]
    (tmp_path / "bad.xml").write_bytes(data)
    good = write(tmp_path / "good.xml", citation(1, "A"))
    with pytest.raises(DataError, match=message):
        write_mesh([good, tmp_path / "bad.xml"], tmp_path / "mesh.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.xml", "good.xml"]


def test_an_entity_is_seen_across_the_border_of_two_reads(tmp_path):
    for shift in range(12):
        filler = b"<!--" + b"x" * (32768 - len(b"<!DOCTYPE x [<!---->") - shift) + b"-->"
        (tmp_path / "bad.xml").write_bytes(b"<!DOCTYPE x [" + filler + b'<!ENTITY a "b">]><PubmedArticleSet/>')
        with pytest.raises(DataError, match="declares entities"):
            write_mesh([tmp_path / "bad.xml"], tmp_path / "mesh.parquet")


def test_a_bomb_without_citations_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(mesh, "MAX_BARREN_BYTES", 2**20)
    data = b"<PubmedArticleSet>" + b"<x/>" * 2_000_000 + b"</PubmedArticleSet>"
    (tmp_path / "bomb.xml.gz").write_bytes(gzip.compress(data))
    with pytest.raises(DataError, match="MB without a citation"):
        write_mesh([tmp_path / "bomb.xml.gz"], tmp_path / "mesh.parquet")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(mesh, "_BATCH_ROWS", 100)

    def peak(count: int) -> int:
        path = write(tmp_path / "big.xml", *(citation(p, *(f"Term {n}" for n in range(9))) for p in range(1, count)))
        tracemalloc.start()
        total = sum(1 for _ in mesh.read_citations(path))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert total == count - 1
        return size

    peak(50)
    assert peak(4000) < peak(500) + 200_000


def test_a_missing_table_and_a_stranger_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no such file"):
        read_mesh_terms(tmp_path / "no.parquet")
    (tmp_path / "x.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match="is no table of MeSH terms"):
        read_mesh_terms(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="there is no such file"):
        write_mesh([tmp_path / "no.xml"], tmp_path / "mesh.parquet")
    with pytest.raises(DataError, match="no file is named"):
        write_mesh([], tmp_path / "mesh.parquet")


def test_the_command_prints_what_it_read(tmp_path):
    write(tmp_path / "a.xml.gz", citation(1, "A"), citation(2))
    done = run_command("data", "mesh", tmp_path / "a.xml.gz", "--out", tmp_path / "mesh.parquet")
    assert done.returncode == 0, done.stderr
    assert "2 citations in 1 files, 2 articles" in done.stdout
