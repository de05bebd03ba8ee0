"""A name, Hub id, folder or file to `(model, preprocess, tokenizer)`, in open_clip's conventions.

Accepts the released models of the zoo by name or Hub id, the folders this project, open_clip and transformers' CLIP
write, the architectures shipped here, and open_clip's own `ARCHITECTURE/TAG`. A name never yields random weights
unless they are asked for, image and text side come with the weights, every key must fit, no file may run code, and
what is in the cache is loaded without a request to anywhere. `model.load_report` says what was loaded.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.errors import CheckpointError, MissingExtra
from biomedclip.models.build import Loaded, LoadReport, Parts, WeightsFile, assemble, model_config, quiet
from biomedclip.models.catalog import architecture_folder, list_architectures, list_names
from biomedclip.models.folders import CONFIG_FILE, FACTS_FILE, HubPlace, folder_place, read_place
from biomedclip.models.hub import fetch, file_hash
from biomedclip.models.preprocess import ImageTransform, open_clip_config, transform_from_open_clip
from biomedclip.models.tokenise import Tokenise, make_tokenizer
from biomedclip.models.zoo import Architecture, File, ReleasedModel, find_model, read_zoo

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a name stands for: the model config that open_clip builds it from."""

    name: str
    pretrained: str | None
    """Tag of the weights for an architecture of open_clip; None for what brings its own."""
    model_cfg: dict[str, Any]


def load(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    checkpoint: str | Path | None = None,
    local_files_only: bool = False,
    trust_pickle: bool = False,
    random_init: bool = False,
    preprocess: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, ImageTransform, Callable[..., Any]]:
    """`(model, preprocess, tokenizer)`, the model in evaluation mode.

    `name` is a released model (`biomedclip models`), a Hub id, a run folder, checkpoint folder or export, an open_clip
    architecture with a tag (`ViT-B-32/openai`), or an architecture shipped here with `random_init=True`. `checkpoint`
    is a file (or folder of files) of the named model that lies elsewhere, with which an architecture needs no tag;
    `revision` another commit of its repository than the pinned one. `trust_pickle` opens a pickle that needs more than
    tensors, which runs the code in it. `preprocess` overrides mean, std, interpolation or resize_mode. Raises
    CheckpointError where the name is unknown, a file is missing, broken or not the published one, or weights do not
    fit.
    """
    parts = find_parts(
        name, revision=revision, checkpoint=checkpoint, local_files_only=local_files_only, random_init=random_init,
        preprocess=preprocess,
    )  # fmt: skip
    if isinstance(parts, Origin):
        return _load_tag(parts, name, device=device, dtype=dtype, random_init=random_init, preprocess=preprocess)
    return assemble(parts, device=device, dtype=dtype, trust_pickle=trust_pickle)


def load_parts(name: str | Path, **options: Any) -> tuple[Parts, Loaded]:
    """A model as `load` gives it, and the parts it was put together from: for what writes it somewhere else."""
    trust_pickle = options.pop("trust_pickle", False)
    parts = find_parts(name, **options)
    if not isinstance(parts, Origin):
        return parts, assemble(parts, trust_pickle=trust_pickle)
    loaded = _load_tag(parts, name, device="cpu", dtype=None, random_init=False, preprocess=None)
    config = dict(parts.model_cfg)
    quick = config.pop("quick_gelu", False)
    architecture = Architecture(activation="quick_gelu" if quick else "gelu", config=config)
    return Parts(where=str(name), architecture=architecture, transform=loaded[1], tokenise=loaded[2]), loaded


def find_parts(
    name: str | Path, *, revision: str | None = None, checkpoint: str | Path | None = None,
    local_files_only: bool = False, random_init: bool = False, preprocess: Mapping[str, Any] | None = None,
) -> Parts | Origin:  # fmt: skip
    """What a name stands for, with its files on this disk; an Origin where open_clip itself must load it."""
    text = str(name)
    path = Path(text.removeprefix("local-dir:"))
    model = find_released(name)
    if model is not None:
        return released_parts(
            model, revision=revision, checkpoint=checkpoint, local_files_only=local_files_only,
            random_init=random_init, preprocess=preprocess,
        )  # fmt: skip
    if text.startswith("local-dir:") or path.is_dir():
        export = find_export(path)
        parts = read_place(
            folder_place(export), str(export), overrides=preprocess, local_files_only=local_files_only,
            weights=not random_init,
        )  # fmt: skip
    elif path.is_file():
        return _parts_of_file(path, local_files_only=local_files_only, preprocess=preprocess)
    elif re.fullmatch(r"(hf-hub:)?[\w.-]+/[\w.-]+", text) and _is_hub_id(text):
        repo = text.removeprefix("hf-hub:")
        place = HubPlace(repo, revision, local_files_only)
        parts = read_place(
            place, repo, overrides=preprocess, local_files_only=local_files_only, weights=not random_init
        )  # fmt: skip
        if parts is None:
            raise CheckpointError(
                repo, f"has neither {CONFIG_FILE} nor a config.json, so nothing says what its weights are",
                todo="name a model of the zoo and the file: load(MODEL, checkpoint=PATH)",
            )  # fmt: skip
        parts.revision = revision
    else:
        return _find_architecture(text, random_init=random_init, checkpoint=checkpoint, preprocess=preprocess)
    if parts is None:
        raise CheckpointError(path, f"holds no {CONFIG_FILE}", todo="name a run folder or an export")
    return _with_checkpoint(parts, checkpoint) if checkpoint is not None else parts


def released_parts(
    model: ReleasedModel, *, revision: str | None = None, checkpoint: str | Path | None = None,
    local_files_only: bool = False, random_init: bool = False, preprocess: Mapping[str, Any] | None = None,
    tokenise: Tokenise | None = None,
) -> Parts:  # fmt: skip
    """A released model with its files on this disk, with another tokenizer than its own where one is given.

    Raises CheckpointError where a file cannot be had.
    """
    beside = Path(checkpoint) if checkpoint is not None else None
    if beside is not None and beside.is_file():
        beside = beside.parent
    companions: dict[str, Path] = {}
    for file in model.files_of("tokenizer"):
        found = _beside(beside, file) or fetch(model, file, revision=revision, local_files_only=local_files_only)
        if found is not None:
            companions[Path(file.paths[0]).name] = found
    weights: list[WeightsFile] = []
    if not random_init:
        weights = [
            _weights_file(model, file, checkpoint, revision, local_files_only) for file in model.files_of("weights")
        ]
    own = revision if revision is not None else model.source.revision if checkpoint is None else None
    transform = ImageTransform(model.preprocess.steps)
    return Parts(
        where=model.name, architecture=model.architecture, keys=model.keys, facts=model, weights=weights, revision=own,
        transform=_override(transform, preprocess, model.name) if preprocess else transform,
        tokenise=tokenise or make_tokenizer(model.tokenizer, companions, model.name), companions=companions,
    )  # fmt: skip


def find_origin(name: str | Path, *, random_init: bool = False) -> Origin:
    """The open_clip config of what `name` stands for. Raises CheckpointError for a name that is none, with the
    nearest one, and for a model whose towers open_clip cannot express."""
    model = find_released(name)
    if model is not None:
        return Origin(name=model.name, pretrained=None, model_cfg=model_config(model.architecture))
    parts = find_parts(name, random_init=random_init)
    if isinstance(parts, Origin):
        return parts
    return Origin(name=str(name), pretrained=None, model_cfg=model_config(parts.architecture))


def find_export(folder: str | Path) -> Path:
    """The folder with the newest weights under a run, checkpoint or export folder.

    A finished run's `final`, else its last checkpoint. Raises CheckpointError where there is none.
    """
    folder = Path(folder)
    candidates = [folder, folder / "final", *sorted((folder / "checkpoints").glob("step-*"), reverse=True)]
    for candidate in candidates:
        if any((candidate / name).exists() for name in (CONFIG_FILE, FACTS_FILE)):
            return candidate
    if (folder / "config.json").exists():
        return folder
    wrong = f"holds no {CONFIG_FILE}, neither itself nor in final/ or checkpoints/"
    if not folder.is_dir():
        wrong = "there is no such folder"
    elif (folder / "run.json").exists():
        wrong = "is a run that has saved no checkpoint yet"
    raise CheckpointError(folder, wrong, todo="name a run folder, or a folder in open_clip's format")


def register_architectures() -> None:
    """Make the shipped architectures known to open_clip, beside its own. Repeating it changes nothing."""
    open_clip = _import_open_clip()
    if not set(list_architectures()) <= set(open_clip.list_models()):
        open_clip.add_model_config(architecture_folder())


def find_released(name: str | Path) -> ReleasedModel | None:
    """The model of the zoo that a name stands for; None where it stands for something else.

    A folder that is called like a model is named by a path: ./plip.
    """
    text = str(name)
    if isinstance(name, Path) or text.startswith("local-dir:") or ("/" in text and Path(text).exists()):
        return None
    return find_model(text)


def _weights_file(
    model: ReleasedModel, file: File, checkpoint: str | Path | None, revision: str | None, local_files_only: bool
) -> WeightsFile:
    if checkpoint is None:
        path = fetch(model, file, revision=revision, local_files_only=local_files_only)
        pinned = file.sha256 if revision is None else None
        if path is None:
            raise CheckpointError(model.name, f"has no file {file.paths[0]}", todo="give checkpoint=PATH")
        return WeightsFile(path=path, prefix=file.prefix, member=file.member, sha256=pinned)
    given = Path(checkpoint)
    wanted = len(model.files_of("weights"))
    if given.is_dir():
        found = _beside(given, file)
        if found is None:
            raise CheckpointError(given, f"holds no {' or '.join(file.paths)}, which {model.name} needs",
                                  todo="name the file itself, or put it there")  # fmt: skip
        given = found
    elif wanted > 1:
        raise CheckpointError(given, f"is one file, and {model.name} needs {wanted}",
                              todo="give the folder that holds them all")  # fmt: skip
    if not given.is_file():
        raise CheckpointError(given, "there is no such file", todo=f"check checkpoint= for {model.name}")
    # The member of an archive may be given unpacked.
    member = file.member if file.member and given.suffix in (".zip", ".tar", ".gz", ".tgz") else None
    return WeightsFile(path=given, prefix=file.prefix, member=member)


def _beside(folder: Path | None, file: File) -> Path | None:
    if folder is None:
        return None
    names = [name for path in file.paths for name in (path, Path(path).name)]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _parts_of_file(path: Path, *, local_files_only: bool, preprocess: Mapping[str, Any] | None) -> Parts:
    """The parts for a bare weights file: of the folder it lies in, or of the zoo where its name or hash is known."""
    place = folder_place(path.parent)
    parts = read_place(place, str(path), overrides=preprocess, local_files_only=local_files_only, weights=False)
    if parts is not None:
        return _with_checkpoint(parts, path)
    models = read_zoo()
    named = [m for m in models if any(path.name in map(_last, f.paths) for f in m.files_of("weights"))]
    fitting = [m for m in models if any(f.sha256 and f.sha256 == file_hash(path) for f in m.files_of("weights"))]
    if len(fitting or named) == 1:
        return released_parts(
            (fitting or named)[0], checkpoint=path, local_files_only=local_files_only, preprocess=preprocess
        )
    some = ", ".join(m.name for m in named[:6]) or "none of the zoo by name or sha256"
    raise CheckpointError(
        path, "is a weights file, and nothing beside it says of which model", found=some,
        todo=f"name it: load('{named[0].name if named else 'MODEL'}', checkpoint='{path}')",
    )  # fmt: skip


def _last(path: str) -> str:
    return Path(path).name


def _with_checkpoint(parts: Parts, checkpoint: str | Path) -> Parts:
    return replace(parts, weights=[WeightsFile(path=Path(checkpoint))])


def _override(transform: ImageTransform, changes: Mapping[str, Any], where: str) -> ImageTransform:
    config = open_clip_config(transform)
    if config is None:
        raise CheckpointError(where, "has an image pipeline of its own, which cannot be overridden",
                              found=", ".join(changes), todo="leave preprocess= out")  # fmt: skip
    return transform_from_open_clip({**config, **changes})


def _is_hub_id(text: str) -> bool:
    """Whether `a/b` is meant as a Hub repository, and not as an open_clip architecture with a tag."""
    if text.startswith("hf-hub:"):
        return True
    register_architectures()
    owner = text.partition("/")[0]
    return not difflib.get_close_matches(owner, _import_open_clip().list_models(), n=1, cutoff=0.8)


def _find_architecture(
    text: str, *, random_init: bool, checkpoint: str | Path | None, preprocess: Mapping[str, Any] | None
) -> Parts | Origin:
    """An architecture with a tag of open_clip, with a file of weights, or for random ones. Raises CheckpointError."""
    open_clip = _import_open_clip()
    register_architectures()
    architecture, _, tag = text.partition("/")
    model_cfg = open_clip.get_model_config(architecture)
    if model_cfg is None:
        raise CheckpointError(text, "is no model, folder or architecture", todo=_suggest(text, open_clip.list_models()))
    if random_init:
        return Origin(name=architecture, pretrained=None, model_cfg=model_cfg)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if checkpoint is not None and (not tag or tag in tags):
        return _architecture_parts(architecture, tag, model_cfg, Path(checkpoint), preprocess)
    if not tag:
        todo = f"name its weights: {architecture}/{tags[0]}" if tags else "ask for random weights: random_init=True"
        raise CheckpointError(text, "is an architecture, without weights", todo=todo)
    if tag not in tags:
        raise CheckpointError(text, f"has no weights '{tag}'", todo=_suggest(tag, tags))
    return Origin(name=architecture, pretrained=tag, model_cfg=model_cfg)


def _architecture_parts(
    architecture: str, tag: str, model_cfg: Mapping[str, Any], checkpoint: Path, preprocess: Mapping[str, Any] | None
) -> Parts:
    """An architecture of open_clip with weights that lie elsewhere; a tag says mean, std and activation of its kind."""
    from dataclasses import asdict

    from open_clip.transform import PreprocessCfg

    open_clip = _import_open_clip()
    if not checkpoint.is_file():
        raise CheckpointError(checkpoint, "there is no such file", todo=f"check checkpoint= for {architecture}")
    facts = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    config = dict(model_cfg)
    quick = config.pop("quick_gelu", False) or facts.get("quick_gelu", False)
    size = config.get("vision_cfg", {}).get("image_size", 224)
    known = asdict(PreprocessCfg())
    kept = {key: facts[key] for key in known if key in facts}
    return Parts(
        where=f"{architecture}/{tag}" if tag else architecture, weights=[WeightsFile(path=checkpoint)],
        architecture=Architecture(activation="quick_gelu" if quick else "gelu", config=config),
        transform=transform_from_open_clip({**known, "size": size, **kept, **(preprocess or {})}),
        tokenise=open_clip.get_tokenizer(architecture),
    )  # fmt: skip


def _load_tag(
    origin: Origin, name: str | Path, *, device: Any, dtype: Any, random_init: bool,
    preprocess: Mapping[str, Any] | None,
) -> Loaded:  # fmt: skip
    """An open_clip architecture with its tag's weights, or random ones, through open_clip's own loading."""
    open_clip = _import_open_clip()
    known = {} if preprocess is None else {"force_preprocess_cfg": dict(preprocess)}
    with _one_error(name), quiet():
        model = open_clip.create_model(
            origin.name, pretrained=None if random_init else origin.pretrained, load_weights=not random_init,
            require_pretrained=not random_init, pretrained_text=False, device=device, **known,
        )  # fmt: skip
        tokenizer = open_clip.get_tokenizer(origin.name)
    if dtype is not None:
        model = model.to(dtype=dtype)
    model.load_report = LoadReport(name=f"{name}, loaded by open_clip", revision=None, files=())
    model.text_config, model.companions, model.facts = None, {}, None
    return model.eval(), transform_from_open_clip(model.visual.preprocess_cfg), tokenizer


@contextmanager
def _one_error(name: str | Path) -> Iterator[None]:
    """Turn what open_clip, the Hub and the weight readers raise into one CheckpointError that names the model."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, SafetensorError, UnpicklingError) as error:
        text = " ".join(str(error).split())
        offline = "no offline copy" if re.search(r"offline|connect|resolve|LocalEntryNotFound", text, re.I) else None
        todo = "download it once with access to the Hub, or name a local folder" if offline else "check the files"
        raise CheckpointError(name, "cannot be loaded", found=text[:300], todo=todo) from error


def _suggest(name: str, known: list[str]) -> str:
    lower = {entry.lower(): entry for entry in [*list_names(), *list_architectures(), *known]}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{lower[near[0]]}'?"
    return "name a folder, an open_clip model such as ViT-B-32/openai, hf-hub:owner/name, or one of `biomedclip models`"


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ImportError:
        raise MissingExtra("train", "open_clip") from None
    return open_clip
