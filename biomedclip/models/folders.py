"""A folder or Hub repository that is not in the zoo, as the parts of a model.

Reads, in this order, `biomedclip_model.json` (what this project exports), `open_clip_config.json` (open_clip) or
`config.json` of a transformers CLIP; yields `Parts` for `biomedclip.models.build`. A place is a function from a file
name to its path or None, so that a folder and a repository are read by the same code. A text tower's own config and
vocabulary are looked for beside the weights first, then in the zoo, and only then asked of the Hub.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biomedclip.config import check_config
from biomedclip.errors import CheckpointError
from biomedclip.models.build import Parts, WeightsFile
from biomedclip.models.hub import NotCached, fetch_hub_file
from biomedclip.models.preprocess import ImageTransform, transform_from_open_clip
from biomedclip.models.tokenise import Tokenise, make_tokenizer
from biomedclip.models.zoo import Architecture, Keys, ReleasedModel, Rule, Step, Tokenizer, read_zoo

Place = Callable[[str], Path | None]

FACTS_FILE = "biomedclip_model.json"
CONFIG_FILE = "open_clip_config.json"
TEXT_CONFIG_FILE = "hf_text_config.json"
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
TOKENIZER_FILES = (
    "vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_CLIP_DEFAULT = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


def folder_place(folder: Path) -> Place:
    """The files of a folder by name."""
    return lambda name: folder / name if (folder / name).is_file() else None


@dataclass(slots=True)
class HubPlace:
    """The files of a Hub repository by name; offline, what is not cached counts as not there."""

    repo: str
    revision: str | None
    local_files_only: bool
    not_cached: NotCached | None = None
    """Why a file was not found that may well exist."""

    def __call__(self, name: str) -> Path | None:
        """The path of a file; None where there is none."""
        try:
            return fetch_hub_file(self.repo, name, revision=self.revision, local_files_only=self.local_files_only)
        except NotCached as error:
            self.not_cached = self.not_cached or error
            return None


def read_place(
    place: Place, where: str, *, overrides: Mapping[str, Any] | None = None, local_files_only: bool = False,
    weights: bool = True,
) -> Parts | None:  # fmt: skip
    """The parts of the model in a place; None where it holds no config. Raises CheckpointError for a broken one."""
    for name, read in ((FACTS_FILE, _read_ours), (CONFIG_FILE, _read_open_clip), ("config.json", _read_transformers)):
        path = place(name)
        if path is not None:
            return read(path, place, where, dict(overrides or {}), local_files_only, weights)
    if isinstance(place, HubPlace) and place.not_cached is not None:
        raise place.not_cached
    return None


def known_text_config(name: str, place: Place, *, local_files_only: bool, where: str) -> dict[str, Any]:
    """The transformers config of an `hf_model_name`: beside the weights, of the zoo, else of the Hub."""
    path = place(TEXT_CONFIG_FILE)
    if path is None:
        for model in read_zoo():
            known = model.architecture.config.get("text_cfg", {}).get("hf_model_name")
            if known == name and model.architecture.text_config is not None:
                return model.architecture.text_config
        path = fetch_hub_file(name, "config.json", revision=None, local_files_only=local_files_only, where=where)
    if path is None:
        raise CheckpointError(
            where, f"needs the config of its text model {name}, which has none", todo="check its name"
        )
    return _read_json(path)


def _read_ours(
    path: Path, place: Place, where: str, overrides: dict[str, Any], local_files_only: bool, weights: bool
) -> Parts:
    facts = check_config(_read_json(path), ReleasedModel, path)
    files = {file.paths[0]: place(file.paths[0]) for file in facts.files_of("tokenizer")}
    companions = {Path(name).name: found for name, found in files.items() if found is not None}
    return Parts(
        where=where, architecture=facts.architecture, transform=ImageTransform(facts.preprocess.steps),
        tokenise=make_tokenizer(facts.tokenizer, companions, where), companions=companions, facts=facts,
        weights=_find_weights(place, where, weights),
    )  # fmt: skip


def _read_open_clip(
    path: Path, place: Place, where: str, overrides: dict[str, Any], local_files_only: bool, weights: bool
) -> Parts:
    config = _read_json(path)
    try:
        model_cfg = dict(config["model_cfg"])
        text, size = dict(model_cfg["text_cfg"]), model_cfg["vision_cfg"].get("image_size", 224)
        model_cfg["embed_dim"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(path, "is no open_clip config", found=repr(error)[:80], todo="export it again") from None
    # Names of open_clip 2.x; it renamed them without reading the old ones any more.
    renamed = {"proj": "hf_proj_type", "pooler_type": "hf_pooler_type"}
    if "hf_model_name" in text:
        text = {renamed.get(key, key): value for key, value in text.items()}
    model_cfg["text_cfg"] = text
    quick = model_cfg.pop("quick_gelu", False)
    text_config = None
    if "hf_model_name" in text:
        text_config = known_text_config(text["hf_model_name"], place, local_files_only=local_files_only, where=where)
    said = {"size": size, **_CLIP_DEFAULT, **config.get("preprocess_cfg", {}), **overrides}
    said["size"] = overrides.get("size", size)
    tokenise, companions = _open_clip_tokenizer(text, place, where, local_files_only)
    return Parts(
        where=where, transform=transform_from_open_clip(said), tokenise=tokenise, companions=companions,
        architecture=Architecture(
            activation="quick_gelu" if quick else "gelu", config=model_cfg, text_config=text_config
        ),
        weights=_find_weights(place, where, weights),
        keys=_open_clip_keys(),
    )  # fmt: skip


def _open_clip_keys() -> Keys:
    """What open_clip itself forgives in a file of its own."""
    return Keys(
        unwrap=("state_dict",),
        rules=(
            Rule(strip="module.", optional=True),
            Rule(drop_arange=r"^text\.transformer\.embeddings\.position_ids$", optional=True),
        ),
    )


def _open_clip_tokenizer(
    text: Mapping[str, Any], place: Place, where: str, local_files_only: bool
) -> tuple[Tokenise, dict[str, Path]]:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    context, name = text.get("context_length", 77), text.get("hf_tokenizer_name")
    options = dict(text.get("tokenizer_kwargs") or {})
    if not name:
        return SimpleTokenizer(context_length=context, **options), {}
    files = {file: found for file in TOKENIZER_FILES if (found := place(file)) is not None}
    companion = HubPlace(name, None, local_files_only)
    if not files:
        files = {file: found for file in TOKENIZER_FILES if (found := companion(file)) is not None}
    if "vocab.txt" in files and not options and not text.get("tokenizer_mode"):
        said = _read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
        facts = Tokenizer(kind="wordpiece", context=context, lower=said.get("do_lower_case", True), clean="open_clip")
        return make_tokenizer(facts, files, where), files
    if not files and companion.not_cached is not None:
        raise companion.not_cached
    if not files:
        raise CheckpointError(where, f"needs the tokenizer of {name}, which has no file of one", todo="check its name")
    folder = next(iter(files.values())).parent
    try:
        mode = text.get("tokenizer_mode")
        return HFTokenizer(str(folder), context_length=context, tokenizer_mode=mode, **options), files
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            folder, "holds no tokenizer that transformers reads", found=" ".join(str(error).split())[:160],
            todo=f"put the tokenizer files of {name} beside the weights",
        ) from error  # fmt: skip


def _read_transformers(
    path: Path, place: Place, where: str, overrides: dict[str, Any], local_files_only: bool, weights: bool
) -> Parts:
    config = _read_json(path)
    if config.get("model_type") != "clip" or "auto_map" in config:
        raise CheckpointError(
            path, "describes a model that is read through the zoo only", found=config.get("model_type"),
            todo="see `biomedclip models list`; without it, only open_clip folders and transformers' CLIP are read",
        )  # fmt: skip
    said = place("preprocessor_config.json")
    context = _text(config, "max_position_embeddings", 77)
    return Parts(
        where=where, architecture=clip_architecture(config, path), keys=Keys(rules=(Rule(preset="hf-clip"),)),
        transform=clip_transform(_read_json(said) if said else {}, overrides),
        tokenise=make_tokenizer(Tokenizer(kind="clip", context=context), {}, where),
        weights=_find_weights(place, where, weights),
    )  # fmt: skip


def clip_architecture(config: Mapping[str, Any], where: Path) -> Architecture:
    """open_clip's words for a transformers CLIP config. Raises CheckpointError for activations that it has not."""
    vision: dict[str, Any] = {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
        "intermediate_size": 3072, "hidden_act": "quick_gelu", **(config.get("vision_config") or {}),
    }  # fmt: skip
    text = {
        name: _text(config, name, usual) for name, usual in
        {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "vocab_size": 49408,
         "max_position_embeddings": 77, "intermediate_size": 2048, "hidden_act": "quick_gelu"}.items()
    }  # fmt: skip
    acts = {vision["hidden_act"], text["hidden_act"]}
    if len(acts) != 1 or not acts <= {"gelu", "quick_gelu"}:
        raise CheckpointError(where, "has activations that open_clip cannot express", found=", ".join(sorted(acts)))
    return Architecture(
        activation=acts.pop(),
        config={
            "embed_dim": config.get("projection_dim", 512),
            "vision_cfg": {
                "image_size": vision["image_size"], "layers": vision["num_hidden_layers"],
                "width": vision["hidden_size"], "patch_size": vision["patch_size"],
                "head_width": vision["hidden_size"] // vision["num_attention_heads"],
                "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
            },
            "text_cfg": {
                "context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"],
                "width": text["hidden_size"], "heads": text["num_attention_heads"],
                "layers": text["num_hidden_layers"], "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
            },
        },
    )  # fmt: skip


def clip_transform(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> ImageTransform:
    """The steps of a transformers CLIP image processor; what its config leaves out is CLIP's."""
    size, crop = config.get("size", {}), config.get("crop_size", {})
    side = size.get("shortest_edge", 224) if isinstance(size, dict) else size
    edge = crop.get("height", side) if isinstance(crop, dict) else crop
    method: Any = overrides.get("interpolation") or {2: "bilinear", 3: "bicubic"}.get(config.get("resample", 3))
    mean = overrides.get("mean") or config.get("image_mean") or _CLIP_DEFAULT["mean"]
    std = overrides.get("std") or config.get("image_std") or _CLIP_DEFAULT["std"]
    return ImageTransform(
        (
            Step(mode="RGB"), Step(resize="shortest", size=side, interpolation=method),
            Step(crop="center", size=edge, rounding="floor"), Step(tensor=255),
            Step(normalize=(tuple(mean), tuple(std))),
        )
    )  # fmt: skip


def _text(config: Mapping[str, Any], name: str, usual: Any) -> Any:
    return (config.get("text_config") or {}).get(name, usual)


def _find_weights(place: Place, where: str, wanted: bool) -> list[WeightsFile]:
    if not wanted:
        return []
    for name in OPEN_CLIP_WEIGHTS:
        path = place(name)
        if path is not None:
            return [WeightsFile(path=path)]
    if isinstance(place, HubPlace) and place.not_cached is not None:
        raise place.not_cached
    raise CheckpointError(where, "holds a config and no weights", found=f"none of {', '.join(OPEN_CLIP_WEIGHTS)}",
                          todo="name the file: checkpoint=PATH")  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(path, "is no JSON", found=str(error)[:80], todo="get it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(path, "holds no table", found=type(value).__name__, todo="get it again")
    return value
