"""Does the model read the sentence: captions against foils that differ in one fact.

Reads captions; yields foils with the side swapped (left for right), the negation turned (pneumothorax, no
pneumothorax), or the finding replaced by another, and scores from cosines. A bag of words passes retrieval and fails
here (ARO, Yuksekgonul et al. 2023). A caption that has nothing to change yields None and is counted by the caller:
no foil is made up where none can be true to its kind.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from biomedclip.evaluation import metrics

_OPPOSITES = (
    ("left", "right"), ("upper", "lower"), ("anterior", "posterior"), ("superior", "inferior"), ("medial", "lateral"),
    ("proximal", "distal"), ("dorsal", "ventral"), ("bilateral", "unilateral"), ("increased", "decreased"),
    ("benign", "malignant"), ("hyperintense", "hypointense"), ("hyperechoic", "hypoechoic"),
    ("hyperdense", "hypodense"),
)  # fmt: skip
FINDINGS = (
    "pneumothorax", "pleural effusion", "consolidation", "atelectasis", "cardiomegaly", "pulmonary edema", "pneumonia",
    "fracture", "hemorrhage", "infarction", "abscess", "cyst", "aneurysm", "thrombosis", "stenosis", "lymphadenopathy",
    "hydronephrosis", "adenocarcinoma", "squamous cell carcinoma", "melanoma", "lymphoma", "glioma", "meningioma",
    "granuloma", "necrosis", "fibrosis", "calcification", "inflammation", "hematoma", "edema",
)  # fmt: skip
"""Findings that captions of figures name often and that seldom imply each other; a run may give its own."""
_OTHER_SIDE = {a: b for pair in _OPPOSITES for a, b in (pair, pair[::-1])}
_SIDE = re.compile(r"\b(" + "|".join(_OTHER_SIDE) + r")\b", re.IGNORECASE)
_ABSENT = re.compile(
    r"\b(?:no (?:evidence|signs?|indication) of|without(?: evidence of)?|absence of|no|free of|negative for)\s+",
    re.IGNORECASE,
)
_PRESENT = re.compile(
    r"\b(?P<lead>with|shows?|showing|demonstrates?|demonstrating|reveals?|revealing|presence of|there is|there are)\s+"
    r"(?:an?\s+|the\s+)?",
    re.IGNORECASE,
)


def swap_side(caption: str) -> str | None:
    """The caption with its first word of place, or of degree, turned into its opposite wherever that pair occurs.

    All occurrences of the pair are swapped, each for the other, so the foil is as consistent as the caption; a
    caption that names both of a pair in a list ("left and right lung") has no foil, as the swap would say the same.
    """
    found = _SIDE.search(caption)
    if not found:
        return None
    word = found.group(1).lower()
    other = _OTHER_SIDE[word]
    both = re.compile(rf"\b({word}|{other})\b", re.IGNORECASE)
    names = {match.group(1).lower() for match in both.finditer(caption)}
    if len(names) == 2 and re.search(rf"\b{word}\s*(?:and|or|,|/)\s*{other}\b|\b{other}\s*(?:and|or|,|/)\s*{word}\b",
                                     caption, re.IGNORECASE):  # fmt: skip
        return None
    return both.sub(lambda m: _match_case(m.group(1), _OTHER_SIDE[m.group(1).lower()]), caption)


def turn_negation(caption: str) -> str | None:
    """The caption that says the opposite: its first negation taken out, or one put in after "with", "showing", …"""
    absent = _ABSENT.search(caption)
    if absent:
        lead = "with " if absent.group().lower().startswith("without") else ""
        rest = caption[absent.end() :]
        changed = caption[: absent.start()] + lead + rest
        return _match_case(caption[0], changed[0]) + changed[1:] if changed and absent.start() == 0 else changed
    present = _PRESENT.search(caption)
    if not present:
        return None
    lead = present.group("lead")
    if lead.lower() == "with":
        return caption[: present.start()] + _match_case(lead, "without") + " " + caption[present.end() :]
    if lead.lower() == "presence of":
        return caption[: present.start()] + _match_case(lead, "absence of") + " " + caption[present.end() :]
    return f"{caption[: present.start()]}{lead} no {caption[present.end() :]}"


def swap_finding(caption: str, findings: Sequence[str], seed: int = 0) -> str | None:
    """The caption with the first of `findings` it names replaced by another that it does not name.

    The longest name counts where several begin at one place. Which one comes instead is a function of caption and
    seed. None where the caption names no finding, or all of them.
    """
    names = sorted(findings, key=len, reverse=True)
    if not names:
        return None
    found = re.search(r"(?<!\w)(" + "|".join(re.escape(name) for name in names) + r")(?!\w)", caption, re.IGNORECASE)
    absent = sorted(name for name in findings if name.lower() not in caption.lower())
    if not found or not absent:
        return None
    number = int.from_bytes(f"{seed}{caption}".encode(), "little") % (2**61 - 1)
    other = absent[number % len(absent)]
    foil = caption[: found.start()] + _match_case(found.group(1), other) + caption[found.end() :]
    # "a pneumonia" and "an effusion": the article must not give the answer away.
    before, after = foil[: found.start()], foil[found.start() :]
    return _fix_article(before, after) + after


def pair_credit(own: ArrayLike, foil: ArrayLike) -> np.ndarray:
    """(N,) 1 where the caption is nearer to its image than the foil, 1/2 for a tie: 0.5 on average is chance."""
    a, b = np.asarray(own, dtype=np.float32), np.asarray(foil, dtype=np.float32)
    return (a > b) + (a == b) / 2


def group_scores(cosines: ArrayLike) -> dict[str, float]:
    """Winoground's text, image and group score (Thrush et al. 2022, section 4) of (N, 2, 2) cosines, image by caption.

    Chance is 1/4, 1/4 and 1/6; a tie counts as wrong there, as in the paper.
    """
    table = np.asarray(cosines, dtype=np.float32)
    text = (table[:, 0, 0] > table[:, 0, 1]) & (table[:, 1, 1] > table[:, 1, 0])
    image = (table[:, 0, 0] > table[:, 1, 0]) & (table[:, 1, 1] > table[:, 0, 1])
    return {
        name: float(metrics.weighted_mean(hits))
        for name, hits in (("text", text), ("image", image), ("group", text & image))
    }


def _match_case(model: str, word: str) -> str:
    if model.isupper() and len(model) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


def _fix_article(before: str, after: str) -> str:
    article = re.search(r"\b(an?) $", before, re.IGNORECASE)
    if not article:
        return before
    wanted = "an" if after[:1].lower() in "aeiou" else "a"
    return before[: article.start()] + _match_case(article.group(1), wanted) + " "
