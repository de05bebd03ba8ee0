"""The released models this project loads: one YAML file of facts a model, checked against the classes below.

A file says where the weights lie, which architecture they fit, how their keys are called there, what becomes of an
image and a sentence on the way in, what the licence is and who said so. Code that loads holds no fact about a single
model; a model is added by adding a file to `zoo/`. Reading the zoo costs no torch.

**Unknown is null.** A `sha256` or `revision` that nobody has seen is `null`, which the load report and the table call
"not pinned"; it is never guessed. What was remembered and not checked stands in `unverified`, a sentence each.

**Where the towers come from.** `architecture.builder` is `open_clip`, then `architecture.config` is open_clip's model
config (`embed_dim`, `vision_cfg`, `text_cfg`); `quick_gelu` follows from `activation`; `text_config` is the content of
the `config.json` that `text_cfg.hf_model_name` names, so that it is not fetched. Any other builder is the name of a
module of `biomedclip/models/towers/`: `builder: keep` stands for `biomedclip.models.towers.keep`, which has

    def build(config: Mapping[str, Any]) -> nn.Module

with `encode_image(images, normalize=False)` and `encode_text(tokens, normalize=False)` to plain (B, D) tensors and
`logit_scale` (a parameter, the logarithm) and, where the model has one, `logit_bias`. `build` reads no file and no
network; the values of its parameters do not matter, because every one is replaced by the checkpoint (they are on the
meta device while loading), but buffers that a checkpoint does not hold must be right. Masks are made from the token
ids inside of the model. A model without a learned scale has the constant of its publication, by a `fill` rule.

**How keys become the model's.** `keys.unwrap` names the entries under which a checkpoint may hold its tensors,
outermost first, each taken where it is present: `[state_dict]`. Then `keys.rules`, in order, each one of

    {preset: hf-clip}                       the rules of that name in biomedclip.models.convert
    {strip: 'module.'}                      take the prefix off where a key has it
    {rename: '^text_encoder\\.', to: 'text.'}  regular expression and replacement, `\\1` for groups (re.sub)
    {drop: 'regex', why: 'optimizer'}       leave these out (re.search); the report lists them
    {drop_arange: 'position_ids$'}          leave these out, and fail where one is not 0, 1, 2, …
    {transpose: 'regex'}                    swap the two dimensions
    {scalar: 'logit_scale'}                 reshape (1,) to ()
    {concat: '^(.+)\\.([qkv])_proj\\.(weight|bias)$', to: '\\1.in_proj_\\3', by: 2, order: [q, k, v]}
                                            stack along dimension 0; `by` is the group that tells parts apart
    {select: '^(.+)\\.fc$', rows: [0, 512]}  keep these rows
    {merge_lora: '^(.+)\\.qkv', ...}         see biomedclip.models.convert
    {fill: logit_scale, value: 3.2189, why: 'ln(1/0.04), the paper'}   a published constant that the file lacks

A rule that matches no key is an error of the file ("wrong model for this file") unless it says `optional: true`.
After the rules the keys must be the model's: `keys.allow_missing` and `keys.allow_extra` are regular expressions of
exceptions (missing: buffers only), each of which the report counts.

**What becomes of an image** is `preprocess.steps`, a list; each step one of

    {mode: RGB | L}                         PIL's convert
    {minmax: true}                          stretch the image's own range to 0..255, uint8 (BioViL)
    {pad: square, fill: 0}                  centred, to the longer side; with `size` at least to that
    {pad: bottom-right, size: 512, fill: 0}
    {resize: shortest | longest | squash, size: 224, interpolation: bicubic, antialias: true}
                                            `rounding: floor` cuts the longer side down (`longest` rounds otherwise)
    {crop: center, size: 224, rounding: half-even | floor}   half-even is torchvision's, floor is transformers';
                                            a smaller image is padded with `fill`
    {channels: 3}                           repeat a grey channel
    {tensor: 255}                           float32 (C, H, W), divided by this; 1 keeps 0..255
    {normalize: [mean, std]}                `clip`, `imagenet`, `half`, or a pair of lists (or of numbers)

in the order of the authors' code: before `tensor` on a PIL image, after it on a tensor. Every list has one `tensor`.

**What becomes of a sentence** is `tokenizer`: `kind` is `clip` (CLIP's byte pairs, bundled), `wordpiece` (from
`vocab.txt`), `json` (`tokenizer.json` of the tokenizers library), `sentencepiece` (a `.spm` or `.model` file, numbered
as XLM-R numbers it) or `auto` (transformers' AutoTokenizer over the files with role `tokenizer`, without remote code).
`pad: max` fills each row to `context`; `pad: longest` to the longest of its batch, which is only allowed where the
published model's embedding does not depend on the padding.
"""

from __future__ import annotations

import difflib
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from biomedclip.config import Config, check_config, read_yaml
from biomedclip.errors import ConfigError
from biomedclip.models.catalog import list_names, plain_facts, zoo_folder

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Md5 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
# Globals beside tensors that a checkpoint's pickle may name. Each only builds numbers, names or dicts.
SafeGlobal = Literal[
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
    "collections.defaultdict",
    "argparse.Namespace",
]


class File(Config):
    """One file of a published model."""

    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Its path in the repository (or its name on a web site); several are tried in turn, safetensors first."""
    role: Literal["weights", "tokenizer", "config"] = "weights"
    size: int | None = None
    """Bytes of `paths[0]`, where known."""
    sha256: Sha256 | None = None
    md5: Md5 | None = None
    repo: str | None = None
    """The Hub repository, where it is not the model's own."""
    revision: str | None = None
    url: str | None = None
    """Where it is downloaded from, for sources that are no Hub repository."""
    member: str | None = None
    """Name inside a zip or tar archive."""
    prefix: str = ""
    """Put before every key, where one model is published as several files of tensors."""
    optional: bool = False
    """A file that may be absent (one of several forms of a tokenizer)."""


class Source(Config):
    """Where a model is published."""

    kind: Literal["hub", "hub-dataset", "url", "manual", "bundled"]
    """`manual`: behind a page that a program cannot download from; the user brings the file. `bundled`: inside of this
    package; its card is written from the results that lie beside the weights."""
    repo: str | None = None
    revision: str | None = None
    folder: str | None = None
    """bundled: the folder of `biomedclip/models/` that holds the files."""
    page: str | None = None
    """The web page a person goes to."""
    gated: bool = False
    terms: str | None = None
    """What a person must do or accept to get it."""


class Licence(Config):
    """What may be done with the weights, and who says so."""

    id: str
    """As on the Hub (`mit`, `cc-by-nc-4.0`, `other`), or `unknown`."""
    name: str | None = None
    """Where the id is `other`."""
    url: str | None = None
    commercial: bool | None = None
    redistribution: bool | None = None
    evidence: str
    """Where it was read; for `unknown`, what was looked at."""


class Architecture(Config):
    """What the weights fit."""

    builder: str = "open_clip"
    activation: Literal["gelu", "quick_gelu"]
    config: dict[str, Any]
    text_config: dict[str, Any] | None = None
    """The transformers config of an `hf_model_name`, with its `model_type`."""
    quick_gelu_doubt: str | None = None
    """Why the activation is not certain, where it is not."""


class Rule(Config):
    """One step from published keys to the model's; exactly one of the verbs. See the module's text."""

    preset: str | None = None
    strip: str | None = None
    rename: str | None = None
    drop: str | None = None
    drop_arange: str | None = None
    transpose: str | None = None
    scalar: str | None = None
    concat: str | None = None
    select: str | None = None
    merge_lora: str | None = None
    fill: str | None = None

    to: str | None = None
    why: str | None = None
    by: int | None = None
    order: tuple[str, ...] = ()
    rows: tuple[int, int] | None = None
    parts: dict[str, int] = Field(default_factory=dict)
    scale: float = 1.0
    value: float | None = None
    optional: bool = False

    @property
    def verb(self) -> str:
        """The one verb it has."""
        return next(verb for verb in VERBS if getattr(self, verb) is not None)

    @model_validator(mode="after")
    def _check(self) -> Rule:
        found = [verb for verb in VERBS if getattr(self, verb) is not None]
        if len(found) != 1:
            raise ValueError(f"a rule has one verb of {', '.join(VERBS)}, not {found}")
        needs = {"rename": ("to",), "concat": ("to", "by", "order"), "select": ("rows",), "drop": ("why",),
                 "fill": ("value", "why"), "merge_lora": ("to", "parts")}  # fmt: skip
        missing = [name for name in needs.get(found[0], ()) if getattr(self, name) in (None, (), {})]
        if missing:
            raise ValueError(f"a {found[0]} rule needs {', '.join(missing)}")
        return self


VERBS = (
    "preset", "strip", "rename", "drop", "drop_arange", "transpose", "scalar", "concat", "select", "merge_lora", "fill",
)  # fmt: skip


class Keys(Config):
    """From the tensors in the published file to the model's."""

    unwrap: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    allow_missing: tuple[str, ...] = ()
    allow_extra: tuple[str, ...] = ()
    safe_globals: tuple[SafeGlobal, ...] = ()
    inert_globals: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*$")], ...] = ()
    """Names that the file's pickle uses for what is no weight (a training config). Each stands for an empty placeholder
    while the file is opened; whatever has that name is neither imported nor called."""


Numbers = tuple[float, ...]


class Step(Config):
    """One step of an image's way into the model; exactly one of the verbs. See the module's text."""

    mode: Literal["RGB", "L"] | None = None
    minmax: Literal[True] | None = None
    pad: Literal["square", "bottom-right"] | None = None
    resize: Literal["shortest", "longest", "squash"] | None = None
    crop: Literal["center"] | None = None
    channels: Literal[3] | None = None
    tensor: Literal[255, 1] | None = None
    normalize: Literal["clip", "imagenet", "half"] | tuple[Numbers, Numbers] | None = None

    size: int | tuple[int, int] | None = None
    """Pixels; a pair is height, width."""
    fill: int = 0
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    antialias: bool = True
    rounding: Literal["half-even", "floor"] = "half-even"

    @property
    def verb(self) -> str:
        """The one verb it has."""
        return next(verb for verb in STEP_VERBS if getattr(self, verb) is not None)

    @model_validator(mode="after")
    def _check(self) -> Step:
        found = [verb for verb in STEP_VERBS if getattr(self, verb) is not None]
        if len(found) != 1:
            raise ValueError(f"a step has one verb of {', '.join(STEP_VERBS)}, not {found}")
        sized = found[0] in ("resize", "crop") or self.pad == "bottom-right"
        if sized and self.size is None:
            raise ValueError(f"a {found[0]} step needs size")
        return self


STEP_VERBS = ("mode", "minmax", "pad", "resize", "crop", "channels", "tensor", "normalize")


class Preprocess(Config):
    """An image's way into the model."""

    steps: Annotated[tuple[Step, ...], Field(min_length=1)]
    origin: str
    """Where the authors' pipeline was read."""

    @model_validator(mode="after")
    def _check(self) -> Preprocess:
        if [step.verb for step in self.steps].count("tensor") != 1:
            raise ValueError("the steps need exactly one `tensor`")
        return self


class Tokenizer(Config):
    """A sentence's way into the model."""

    kind: Literal["clip", "wordpiece", "json", "sentencepiece", "auto"]
    context: int
    """Tokens with start and end; longer text is cut and keeps its end token."""
    pad: Literal["max", "longest"] = "max"
    pad_id: int = 0
    lower: bool = True
    """wordpiece: lower case and strip accents (uncased BERT)."""
    clean: Literal["open_clip", "none"] = "none"
    """`open_clip`: mend encoding, resolve HTML entities and runs of spaces first, as its tokenizers do."""
    batch_invariant: bool = True
    """False: the published embedding depends on the padding; then `exception` says how."""
    exception: str | None = None


class Scoring(Config):
    """How cosines become probabilities."""

    kind: Literal["softmax", "sigmoid", "pairs"]
    """`pairs`: softmax of a positive and a negative prompt for each finding."""
    template: str = "{}"
    note: str | None = None


class Reported(Config):
    """A number the authors report. Quoted, never shown as measured here."""

    task: str
    metric: str
    value: float
    source: str


class Paper(Config):
    """The publication to cite."""

    title: str
    year: int
    arxiv: str | None = None
    doi: str | None = None
    venue: str | None = None


class ReleasedModel(Config):
    """Everything known about one released model; one file of `zoo/`."""

    name: Name
    aliases: tuple[str, ...] = ()
    title: str
    summary: str
    """One line: what it was trained on."""
    domains: Annotated[tuple[str, ...], Field(min_length=1)]
    status: Literal["documented", "layout-tested", "weights-tested"]
    """`layout-tested`: random weights in the published layout load and give the outputs of another implementation;
    `weights-tested`: the published weights were loaded and gave a published output."""
    compared_with: str
    """What the outputs were compared with: `open_clip`, `transformers`, or `a reference in the tests`."""
    source: Source
    files: Annotated[tuple[File, ...], Field(min_length=1)]
    licence: Licence
    architecture: Architecture
    keys: Keys = Keys()
    preprocess: Preprocess
    tokenizer: Tokenizer
    scoring: Scoring
    paper: Paper | None
    intended_use: str
    training_data: str
    reported: tuple[Reported, ...] = ()
    limits: tuple[str, ...] = ()
    """Known failure modes and traps."""
    unverified: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> ReleasedModel:
        if not any(file.role == "weights" for file in self.files):
            raise ValueError("no file has the role weights")
        if self.source.kind.startswith("hub") and not self.source.repo:
            raise ValueError("source.repo is missing")
        if (self.source.kind == "bundled") != (self.source.folder is not None):
            raise ValueError("source.folder belongs to what is bundled, and to nothing else")
        if self.tokenizer.kind == "wordpiece" and not self.files_of("tokenizer"):
            raise ValueError("a wordpiece tokenizer needs a file vocab.txt with role tokenizer")
        return self

    def files_of(self, role: str) -> tuple[File, ...]:
        """Its files with this role."""
        return tuple(file for file in self.files if file.role == role)


@cache
def read_model(name: str) -> ReleasedModel:
    """The facts of one model by its name. Raises ConfigError where the file breaks the schema."""
    path = zoo_folder() / f"{name}.yaml"
    model = check_config(read_yaml(path), ReleasedModel, path)
    if model.name != name:
        raise ConfigError(path, "is named for another model", found=model.name, todo="name file and model alike")
    return model


def read_zoo() -> list[ReleasedModel]:
    """The facts of all released models, sorted by name."""
    return [read_model(name) for name in list_names()]


def find_model(name: str) -> ReleasedModel | None:
    """The model of this name, alias or Hub repository (with or without `hf-hub:`); None for a stranger."""
    wanted = name.removeprefix("hf-hub:").lower()
    if wanted in list_names():
        return read_model(wanted)
    for candidate in list_names():
        facts = plain_facts(candidate)
        if wanted in {str(alias).lower() for alias in (*facts.get("aliases", ()), facts["source"].get("repo"))}:
            return read_model(candidate)
    return None


def require_model(name: str) -> ReleasedModel:
    """The model of this name, alias or Hub repository. Raises ConfigError with the nearest name for a stranger."""
    model = find_model(name)
    if model is None:
        near = difflib.get_close_matches(name.lower(), list_names(), n=1, cutoff=0.5)
        todo = f"did you mean '{near[0]}'?" if near else "run: biomedclip models"
        raise ConfigError(name, "is no model of the zoo", todo=todo)
    return model
