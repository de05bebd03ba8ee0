"""A caption in, the concepts its words name and the modality of its picture out, by n-gram rules alone.

The rules are two small tables (`concept_rules/`): word sequences labelled by physicians of the MultiCaRe project, and
our own for what case reports lack (blots, charts, microscopes). At each word the longest known sequence counts, and its
words are used up, so `optical coherence tomography` is not also a tomography. Rules cannot see the picture: a caption
that names no technique gets no modality, and one that names several gets the one it names first, because captions
begin with what is shown and go on to what it was compared with.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import resources

from biomedclip.errors import DataError

BLOCKER = "_LABEL_BLOCKER"
ABSENT = "_assertion_absent"

MODALITIES: dict[str, tuple[str, ...]] = {
    "pet": ("pet",),
    "nuclear medicine": ("nuclear_medicine", "spect", "scintigraphy"),
    "ct": ("ct",),
    "mri": ("mri",),
    "ultrasound": ("ultrasound",),
    "x-ray": ("x_ray",),
    "x-ray angiography": ("angiography", "arteriogram", "venogram", "cholangiogram", "myelogram"),
    "optical coherence tomography": ("oct", "spectral_domain"),
    "fundus photograph": ("fundus_photograph", "fundus_image"),
    "fundus angiography": ("fluorescein_angiography", "icga", "ophtalmic_angiography", "autofluorescence"),
    "slit lamp photograph": ("slit_lamp_photograph", "anterior_segment_image", "gonioscopy"),
    "endoscopy": (
        "endoscopy", "egd", "colonoscopy", "bronchoscopy", "gastroscopy", "laryngoscopy", "cystoscopy", "arthroscopy",
        "enteroscopy", "hysteroscopy", "nbi",
    ),
    "histopathology": (
        "h&e", "ihc", "pas", "masson_trichrome", "congo_red", "giemsa", "methenamine_silver", "acid_fast", "gram",
        "papanicolaou", "van_gieson", "alcian_blue", "methylene_blue", "immunostaining", "histology",
        "in_situ_hybridization",
    ),
    "fluorescence microscopy": ("fluorescence_microscopy", "immunofluorescence", "fish"),
    "electron microscopy": ("electron_microscopy",),
    "light microscopy": ("light_microscopy",),
    "electrography": ("ekg", "eeg", "emg", "electrography"),
    "clinical photograph": ("medical_photograph", "other_medical_photograph", "skin_photograph", "oral_photograph"),
    "flow cytometry": ("flow_cytometry",),
    "gel": ("gel",),
    "spectrum": ("spectrum",),
    "molecular structure": ("molecular_structure",),
    "sequence": ("sequence",),
    "tree": ("tree",),
    "map": ("map",),
    "chart": ("chart",),
    "diagram": ("diagram",),
}  # fmt: skip
"""Modality -> concepts that name the technique. Keys are spelt so that `biomedclip.stream.presets` knows them."""

IMPLIED: dict[str, tuple[str, ...]] = {
    "mri": ("t1", "t2", "flair", "dwi", "stir", "fat_suppression", "spin_echo", "ir", "tractography"),
    "ct": ("lung_window", "bone_window", "soft_tissue_window", "brain_window"),
    "ultrasound": (
        "doppler", "b_scan", "m_mode", "transesophageal", "transthoracic", "transvaginal", "transabdominal",
        "parasternal", "subcostal", "suprasternal", "intravascular", "2_chamber", "3_chamber", "4_chamber", "5_chamber",
    ),
    "x-ray": ("periapical", "occlusal", "panoramic", "posteroanterior", "anteroposterior", "radiology"),
    "histopathology": ("pathology",),
    "chart": ("statistics",),
}  # fmt: skip
"""Modality -> concepts that go with a technique without naming it; asked only where none is named."""

ABSORBED: dict[str, tuple[str, ...]] = {
    "pet": ("ct", "mri", "nuclear medicine"),
    "nuclear medicine": ("ct",),
    "ct": ("x-ray angiography",),
    "mri": ("x-ray angiography",),
    "optical coherence tomography": ("ct", "x-ray angiography"),
    "fundus angiography": ("x-ray angiography", "fundus photograph"),
    "ultrasound": ("endoscopy",),
}
"""Modality -> those it takes in wherever both are named: PET/CT is PET, CT angiography is CT, an endoscopic ultrasound
is ultrasound."""

_NEGATABLE = frozenset(("mass", "malignant", "benign", "contrast"))
_NEGATION_REACH = 4
_WORDS = re.compile(r"[^\W_]+(?:&[^\W_]+)*")
_AMPERSAND = re.compile(r"\s*&\s*")
_STRONG = {concept: modality for modality, concepts in MODALITIES.items() for concept in concepts}
_WEAK = {concept: modality for modality, concepts in IMPLIED.items() for concept in concepts}


def tag_caption(caption: str) -> tuple[str, ...]:
    """The concepts that a caption names, each once, in the order of first mention.

    A mass, malignancy or contrast that follows within four words of `no`, `without` or the like is not named.
    """
    rules, starts, most = _rules()
    words = _split(caption)
    found: dict[str, None] = {}
    after, absent = 0, -_NEGATION_REACH
    for position, word in enumerate(words):
        if position < after or word not in starts:
            continue
        for size in range(min(most, starts[word], len(words) - position), 0, -1):
            labels = rules.get(" ".join(words[position : position + size]) if size > 1 else word)
            if labels is None:
                continue
            after = position + size
            for label in labels:
                if label == ABSENT:
                    absent = after
                elif label != BLOCKER and (label not in _NEGATABLE or position - absent >= _NEGATION_REACH):
                    found[label] = None
            break
    return tuple(found)


def modality_of(concepts: Iterable[str]) -> str | None:
    """The modality, one of MODALITIES, that concepts in order of mention speak of; None where they name none.

    Precedence: a named technique before one that is only implied (`IMPLIED`); then a modality before those it takes in
    (`ABSORBED`); then the one mentioned first.
    """
    concepts = tuple(concepts)
    for table in (_STRONG, _WEAK):
        named = dict.fromkeys(table[concept] for concept in concepts if concept in table)
        for modality in named:
            if not any(modality in ABSORBED.get(other, ()) for other in named):
                return modality
    return None


def _split(text: str) -> list[str]:
    text = text.lower()
    return _WORDS.findall(_AMPERSAND.sub("&", text) if "&" in text else text)


@lru_cache(maxsize=1)
def _rules() -> tuple[Mapping[str, tuple[str, ...]], Mapping[str, int], int]:
    """Words joined by blanks -> labels; first word -> length of the longest rule it begins; that of all rules."""
    rules: dict[str, tuple[str, ...]] = {}
    starts: dict[str, int] = {}
    for name in ("multicare.csv", "additions.csv"):
        path = resources.files("data_builders") / "concept_rules" / name
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            words = _split(row["ngram"])
            if not words or not row["labels"]:
                raise DataError(str(path), "has an empty rule", found=repr(row))
            rules[" ".join(words)] = tuple(row["labels"].split())
            starts[words[0]] = max(starts.get(words[0], 0), len(words))
    return rules, starts, max(starts.values())
