"""Words that give away a modality or a part of the body, for finding sentences that ended up in the wrong set.

A published prompt set calls a breast lesion a migraine; no grammar finds that, a list of words does. The lists hold
words that belong to one place and hardly to another: `lung`, but not `mass`. A word that belongs to several of them is
foreign only to a set that shows none of these.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from data_builders.labels.recipe import Recipe

MODALITIES = {
    "X-ray": r"x-?rays?|radiographs?|radiography|mammogra\w+",
    "CT": r"ct|computed tomography",
    "MRI": r"mri?|magnetic resonance|mr angiogra\w+",
    "ultrasound": r"ultrasound|ultrasonogra\w+|sonogra\w+|echocardiogra\w+",
    "fundus": r"fundus|fundoscop\w+|retinal photographs?",
    "OCT": r"oct|optical coherence tomography",
    "dermoscopy": r"dermoscop\w+|dermatoscop\w+",
    "endoscopy": r"endoscop\w+|colonoscop\w+|gastroscop\w+|laparoscop\w+",
    "microscopy": r"microscop\w+|micrographs?|histopatholog\w+|histolog\w+|h&e|smears?|cytolog\w+|blood film",
}

REGIONS = {
    "abdomen": r"abdom\w+|stomach|gastric|liver|hepat\w+|kidneys?|renal|spleen|splenic|pancrea\w+|gallbladder|bladder"
               r"|bowel|adrenal|colon|colorectal|mesenter\w+|peritone\w+|intestin\w+|ureter\w*",
    "blood": r"blood|erythro\w+|leu[ck]ocyt\w+|platelets?|thrombocyt\w+|neutrophil\w*|eosinophil\w*|basophil\w*"
             r"|monocyt\w+|lymphocyt\w+|granulocyt\w+|myelo\w+|promyelo\w+|monoblast\w*|red cells?|white cells?",
    "bone": r"bones?|fractur\w+|femur|femoral|ribs?|oss\w+|osteo\w+|clavicle|humer\w+|marrow",
    "bowel": r"bowel|colon\w*|colorectal|rectum|rectal|polyps?|c[ae]*ecum|ileum|duoden\w+|gastric|stomach|pylor\w+"
             r"|o?esophag\w+|h[ae]*emorrhoids?|colitis|intestin\w+|hyperplastic|sessile|stool",
    "brain": r"brain|cerebr\w+|migraines?|headaches?|glioma\w*|meningioma\w*|pituitary|intracranial|strokes?"
             r"|white matter|aneurysm\w*",
    "breast": r"breasts?|mammar\w+|mammogra\w+|lactation",
    "cervix": r"cervi(?:x|cal)|koilocyt\w+|endometri\w+",
    "chest": r"lungs?|pulmonary|pleura\w*|pneumo\w+|atelecta\w+|thora\w+|mediastin\w+|chest|bronch\w+|emphysem\w+",
    "eye": r"eyes?|retina\w*|retino\w+|retinitis|macul\w+|fundus|glaucoma\w*|cataracts?|optic|drusen|choroid\w*"
           r"|myopi\w+|nevus|ocular|vitre\w+|microaneurysm\w*|intraocular|fove\w+",
    "heart": r"heart|cardi\w+|aort\w+|ventric\w+",
    "joint": r"knees?|menisc\w+|cruciate|shoulders?|hips?|ankles?|foot|joints?|tendon\w*|cartilag\w+|osteoarthritis"
             r"|ligament\w*|chondral|labr\w+|patell\w+|rotator",
    "kidney": r"kidneys?|renal|nephr\w+|glomerul\w+|tubules?|podocyt\w+",
    "liver": r"liver|hepat\w+",
    "lymph": r"lymph\w*",
    "nerve": r"synap\w+|neuron\w*|axon\w*|dendrit\w+",
    "parasite": r"parasit\w+|plasmodium|malaria\w*|trophozoites?|helminth\w*|hookworms?|tapeworms?|whipworms?"
                r"|pinworms?|roundworms?|flukes?|gametocyt\w+|schizonts?",
    "pelvis": r"pelvi\w+|bladder|uter\w+|ovar\w+|prostat\w+|femoral|femur|seminal",
    "prostate": r"prostat\w+|gleason",
    "skin": r"skin|dermal|epiderm\w+|cutaneous|n[ae]*ev(?:us|i)|melanom\w+|melanocyt\w+|keratos[ei]s|keratotic"
            r"|dermatofibrom\w+",
    "spine": r"spin(?:e|al)|vertebra\w*|intervertebral|facet|foramin\w+|scolio\w+|dural",
    "thyroid": r"thyroid\w*",
}  # fmt: skip


def _whole_words(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-])(?:{words})(?![\w-])", re.IGNORECASE)


_MODALITY_PATTERNS = {name: _whole_words(words) for name, words in MODALITIES.items()}
_REGION_PATTERNS = {name: _whole_words(words) for name, words in REGIONS.items()}


def foreign_modalities(recipe: Recipe) -> dict[str, re.Pattern[str]]:
    """Modality -> its words, for those the recipe's own modality is not; empty where the recipe's is none we know."""
    said = " ; ".join(recipe.modality_forms)
    own = {name for name, pattern in _MODALITY_PATTERNS.items() if pattern.search(said)}
    return {name: pattern for name, pattern in _MODALITY_PATTERNS.items() if name not in own} if own else {}


def foreign_regions(text: str, own: Collection[str]) -> Iterator[tuple[str, str]]:
    """(word, part of the body) of every word that belongs elsewhere than to the parts that are shown."""
    for name, pattern in _REGION_PATTERNS.items():
        if name in own:
            continue
        for found in pattern.finditer(text):
            if not any(_REGION_PATTERNS[region].fullmatch(found[0]) for region in own):
                yield found[0], name
