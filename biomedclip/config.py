"""One YAML file, checked against a pydantic model, is one run.

Reads YAML with 1.2 scalars (`1e-4` is a number, `no` is the word no, `010` is refused because readers disagree on
it), applies `--set a.b=c`, and returns the frozen model. Every mistake is a `ConfigError` of one line that names the
file, the key path, what was found and the nearest known key. There are no includes, interpolations or environment
variables: a file is the record of a run.

The models of the runs live beside the code they configure (`data_builders.build.BuildConfig`,
`biomedclip.training.config.TrainConfig`, `biomedclip.evaluation.config.EvaluateConfig`); this module only knows
how to read them.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from biomedclip.errors import ConfigError


class Config(BaseModel):
    """Base of every run config: unknown keys and silent conversions are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())


ConfigT = TypeVar("ConfigT", bound=Config)


class _Loader(yaml.SafeLoader):
    """Safe YAML loader with the scalars of YAML 1.2's core schema and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} appears twice", problem_mark=key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("leading_zero", r"[-+]?0[0-9]+", "-+0"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _refuse_leading_zero(loader: _Loader, node: yaml.ScalarNode) -> None:
    raise yaml.MarkedYAMLError(
        problem=f"{node.value} has a leading zero, which YAML readers take differently; quote it or drop the zero",
        problem_mark=node.start_mark,
    )


_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor("tag:yaml.org,2002:leading_zero", _refuse_leading_zero)


def parse_yaml(text: str, where: str | Path = "yaml") -> Any:
    """The value of a YAML 1.2 document. Raises ConfigError with the line of a syntax error."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader subclass)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{where}: line {mark.line + 1}" if mark else where
        raise ConfigError(line, getattr(error, "problem", None) or str(error)) from None


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML 1.2 file. Raises ConfigError where the file is missing, not UTF-8 or not YAML."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(path, "there is no such file", todo=_nearest_file(path)) from None
    except IsADirectoryError:
        raise ConfigError(path, "is a folder", todo="name one .yaml file inside it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(path, f"is not UTF-8 at byte {error.start}", todo="save it as UTF-8") from None
    return parse_yaml(text, path)


def load_config(path: str | Path, model: type[ConfigT], overrides: Sequence[str] = ()) -> ConfigT:
    """The run described by a YAML file and `key.path=value` overrides, checked and frozen.

    Raises ConfigError with one line a mistake: unknown keys (with the nearest known one), wrong types, values out of
    range, malformed overrides.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(path, "must hold `key: value` lines", found=type(values).__name__)
    for override in overrides:
        _apply_override(values, override)
    return check_config(values, model, path)


def read_overrides(
    overrides: Sequence[str], model: type[ConfigT], *, given: Mapping[str, Any] = MappingProxyType({})
) -> ConfigT:
    """The run described by `key=value` overrides, for commands without a file; mistakes as in `load_config`.

    `given` are the values that the command's arguments stand for.
    """
    values: dict[str, Any] = copy.deepcopy(dict(given))
    for override in overrides:
        _apply_override(values, override)
    return check_config(values, model, "--set")


def check_config(values: dict[str, Any], model: type[ConfigT], where: str | Path) -> ConfigT:
    """`values` as a frozen `model`. Raises ConfigError with one line a mistake; `where` names their origin."""
    try:
        # Strict JSON rules: a list may become a tuple and a string a path, but '1e-4' is no number and true no integer.
        return model.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        lines = [_explain(dict(problem), model) for problem in error.errors(include_url=False)]
        raise ConfigError(where, "\n".join([lines[0], *(f"{where}: {line}" for line in lines[1:])])) from None


def config_file(name: str) -> Path:
    """Path of a config shipped with the project, such as `train/demo.yaml`, in a clone or an installed wheel."""
    clone = Path(__file__).resolve().parent.parent / "configs" / name
    packaged = Path(str(resources.files("biomedclip"))) / "configs" / name
    path = packaged if packaged.exists() else clone
    if not path.exists():
        raise ConfigError(name, "is no config of this project", todo="run: biomedclip doctor")
    return path


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}", "is not key=value", todo="write, for example, --set optim.lr=1e-4")
    node: Any = values
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            node = _list_item(node, key, override)
            continue
        child = node.setdefault(key, {})
        if not isinstance(child, dict | list):
            where = ".".join(keys[: depth + 1])
            raise ConfigError(f"--set {override}", f"{where} is a value, not a section", found=repr(child))
        node = child
    value = parse_yaml(text, f"--set {override}")
    if isinstance(node, list):
        _list_item(node, keys[-1], override)
        node[int(keys[-1])] = value
    else:
        node[keys[-1]] = value


def _list_item(items: list[Any], key: str, override: str) -> Any:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(f"--set {override}", f"the list has items 0 to {len(items) - 1}", found=repr(key))
    return items[int(key)]


def _explain(problem: dict[str, Any], model: type[BaseModel]) -> str:
    """One pydantic error as `a.b: what (found …); what to do`."""
    location = _field_path(model, problem["loc"])
    path, kind, found = ".".join(str(part) for part in location), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if kind == "missing":
        return f"{path}: is missing; add it"
    text = problem["msg"][0].lower() + problem["msg"][1:]
    text = text.removeprefix("value error, ").removeprefix("input ")
    near = difflib.get_close_matches(str(found), re.findall(r"'([^']+)'", text), n=1) if kind == "literal_error" else []
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{path}: {text} (found {found!r:.80}){hint}"


def _field_path(model: type[BaseModel], location: Sequence[Any]) -> list[Any]:
    """The keys a user wrote, without the member names pydantic adds for unions; the last part is always kept."""
    path: list[Any] = []
    for depth, part in enumerate(location):
        is_key = part in _known_keys(model, path) or isinstance(part, int)
        if is_key or depth == len(location) - 1:
            path.append(part)
    return path


def _known_keys(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Keys a section accepts; for a union of sections, of all its members."""
    models = [model]
    for part in path:
        if not isinstance(part, int):
            fields = [m.model_fields[part] for m in models if part in m.model_fields]
            models = [found for field in fields for found in _models_in(field.annotation)]
    return sorted({key for candidate in models for key in candidate.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [found for argument in typing.get_args(annotation) for found in _models_in(argument)]
    return []


def _nearest_file(path: Path) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
    return f"did you mean {path.parent / near[0]}?" if near else "check the path"
