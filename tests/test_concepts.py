"""Concepts: what captions name, and the modality they speak of; real captions are quoted with their PMC id."""

from __future__ import annotations

import csv
import re
import time
from importlib import resources

import pytest

from biomedclip.stream.presets import preset_for
from data_builders.concepts import ABSORBED, BLOCKER, IMPLIED, MODALITIES, modality_of, tag_caption

RULES = resources.files("data_builders") / "concept_rules"


def read_rules(name: str) -> list[tuple[str, str]]:
    with (RULES / name).open(encoding="utf-8", newline="") as file:
        return [(row["ngram"], row["labels"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("caption", "modality"),
    [
        # CC BY captions of ROCO, by PMC id
        # PMC1660580
        ("Panoramic X ray taken four years later showing a unilocular radiolucent area in the left ramus.", "x-ray"),
        ("Axial source image from an intracranial magnetic resonance angiogram reveals abnormal arterial signal "
         "elevation in the left more than right cavernous sinuses.", "mri"),  # PMC5665693, shortened
        ("Arthroscopic photograph showing normal lateral meniscus.", "endoscopy"),  # PMC2639558
        ("Sagittal T2-weighted MR image through the midline of the pelvis.", "mri"),  # PMC2495002
        # written for this test
        ("Chest CT angiography of a man with pulmonary embolism.", "ct"),
        ("18F-FDG PET/CT showing uptake in the left lung, later confirmed by MRI.", "pet"),
        ("Optical coherence tomography of the macula.", "optical coherence tomography"),
        ("Endoscopic ultrasound of the pancreas.", "ultrasound"),
        ("H & E stain of the resected specimen, x200.", "histopathology"),
        ("Western blot of whole cell lysates.", "gel"),
        ("Transmission electron micrograph of a mitochondrion.", "electron microscopy"),
        ("Confocal images of HeLa cells; nuclei were stained with DAPI.", "fluorescence microscopy"),
        ("Kaplan–Meier survival curves of both groups.", "chart"),
        ("Flow chart of study selection.", "diagram"),
        ("Axial view in a T1-weighted sequence with fat suppression.", "mri"),
        ("Surface plasmon resonance of the antibody.", None),
        ("The patient's cat and a fish tank.", None),
        ("Cells were counted.", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_caption_speaks_of_its_modality(caption: str, modality: str | None) -> None:
    assert modality_of(tag_caption(caption)) == modality


def test_concepts_come_once_in_the_order_of_first_mention() -> None:
    tags = tag_caption("Contrast-enhanced CT of the abdomen. The CT shows the liver.")
    assert tags == ("contrast", "ct", "abdomen")


def test_the_longest_rule_uses_its_words_up() -> None:
    assert "ct" not in tag_caption("optical coherence tomography")
    assert "ct" in tag_caption("computed tomography")
    assert tag_caption("CT-guided biopsy") == ()


def test_a_finding_that_is_denied_is_not_tagged() -> None:
    assert "mass" in tag_caption("CT shows a mass")
    assert "mass" not in tag_caption("CT shows no mass")
    assert "mass" not in tag_caption("CT without a residual mass")
    assert "ct" in tag_caption("no CT was done")
    assert "mass" in tag_caption("no fever was seen before, but a mass")


def test_case_hyphens_and_ampersands_do_not_matter() -> None:
    assert tag_caption("X-RAY") == tag_caption("x ray") == ("x_ray",)
    assert tag_caption("H&E stain") == tag_caption("h & e stain") == ("h&e",)


def test_a_named_technique_goes_before_an_implied_one_and_then_the_first_one() -> None:
    assert modality_of(("t1", "ct")) == "ct"
    assert modality_of(("ultrasound", "ct")) == "ultrasound"
    assert modality_of(("ct", "ultrasound")) == "ct"
    assert modality_of(("ct", "pet")) == "pet"
    assert modality_of(("head", "contrast")) is None


def test_the_rules_are_small_clean_and_of_known_labels() -> None:
    assert sum((RULES / name).stat().st_size for name in ("multicare.csv", "additions.csv")) < 400_000
    rules = [*read_rules("multicare.csv"), *read_rules("additions.csv")]
    assert all(re.fullmatch(r"[a-z0-9_&]+( [a-z0-9_&]+)*", labels, re.IGNORECASE) for _, labels in rules)
    assert all(ngram == ngram.strip().lower() for ngram, _ in rules)
    for name in ("multicare.csv", "additions.csv"):
        ngrams = [ngram for ngram, _ in read_rules(name)]
        assert len(ngrams) == len(set(ngrams)) > 500
        assert f"| `{name}` |" in (RULES / "README.md").read_text(encoding="utf-8")
    labels = {label for _, words in rules for label in words.split()}
    assert BLOCKER in labels
    evidence = {concept for table in (MODALITIES, IMPLIED) for concepts in table.values() for concept in concepts}
    assert evidence <= labels
    assert {m for absorbed in ABSORBED.values() for m in absorbed} | set(ABSORBED) | set(IMPLIED) <= set(MODALITIES)


def test_augmentation_knows_our_modalities() -> None:
    assert {name: preset_for(name) for name in ("ct", "x-ray", "histopathology", "endoscopy", "chart")} == {
        "ct": "radiology", "x-ray": "radiology", "histopathology": "pathology", "endoscopy": "endoscopy",
        "chart": "figure",
    }  # fmt: skip


def test_tagging_is_fast() -> None:
    captions = ["Axial contrast-enhanced CT scan of the abdomen showing a mass in the liver (arrow). " * 2] * 2000
    tag_caption(captions[0])
    start = time.process_time()
    for caption in captions:
        tag_caption(caption)
    # 50,000 a second were measured on one core; a fifth of that allows for a slow machine.
    assert len(captions) / (time.process_time() - start) > 8_000
