"""The layer table of the design, as a test over every import, also those inside functions."""

import ast
from functools import cache
from pathlib import Path

from fresh_python import run_fresh

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("biomedclip/**/*.py"), *ROOT.glob("data_builders/**/*.py")])

# A room may import from rooms of a lower number, and from its own.
LEVELS = {
    "biomedclip.errors": 0,
    "biomedclip.schema": 0,
    "biomedclip.files": 1,
    "biomedclip.licences": 1,
    "biomedclip.config": 1,
    "biomedclip.progress": 1,
    "biomedclip.images": 2,
    "biomedclip.windows": 2,
    "biomedclip.dicom": 3,
    "biomedclip.tokens": 2,
    "biomedclip.predicates": 2,
    "biomedclip.runs": 2,
    "biomedclip.shards": 3,
    "biomedclip.layouts": 4,
    "biomedclip.page": 4,
    "data_builders": 5,
    "biomedclip.models": 5,
    "biomedclip.stream": 5,
    "biomedclip.evaluation": 6,
    "biomedclip.annotation": 7,
    "biomedclip.training": 7,
    "biomedclip.demo": 8,
    "biomedclip.doctor": 8,
    "biomedclip.app": 8,
    "biomedclip.annotate_commands": 8,
    "biomedclip.app_commands": 9,
    "biomedclip.stream_commands": 8,
    "biomedclip.train_commands": 8,
    "biomedclip.model_commands": 8,
    "biomedclip.eval_commands": 8,
    "biomedclip.continual_commands": 8,
    "biomedclip.vqa_commands": 8,
    "biomedclip.data_commands": 9,
    "biomedclip.cli": 10,
    "biomedclip.__main__": 11,
}
TORCH_SIDE = {"torch", "torchvision", "lightning", "open_clip", "monai", "webdataset", "timm", "transformers"}
ABOVE_TORCH = {name for name, level in LEVELS.items() if level <= 4 or name == "data_builders"}
COMMAND_LINE = {"biomedclip.cli", "biomedclip.data_commands"}
# The volume layout needs MONAI to read a CT or MR volume, and imports it only then.
VOLUME_READERS = {"biomedclip.layouts.volumes"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "data_builders":
        return "data_builders"
    return ".".join(parts[:2]) if parts[0] == "biomedclip" and len(parts) > 1 else None


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported_modules(path: Path) -> frozenset[str]:
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return frozenset(found)


def wrong_imports(path: Path) -> list[str]:
    module = module_name(path)
    here, wrong = room(module), []
    if here is None:
        return []
    if here not in LEVELS:
        return [f"{here} is not in the layer table"]
    for name in imported_modules(path):
        there = room(name)
        if there is None or there == here or there not in LEVELS:
            continue
        if LEVELS[there] >= LEVELS[here]:
            wrong.append(f"{module} imports {name}")
        if here == "data_builders" and there not in ABOVE_TORCH:
            wrong.append(f"{module} imports {name}, which stands below the torch line")
        if there == "data_builders" and here not in COMMAND_LINE:
            wrong.append(f"{module} imports {name}; only the command line may")
    return wrong


# A rule is one test over all files and names every place that breaks it: a test a file would be most of the suite.


def test_a_room_imports_only_from_rooms_below_it():
    assert len(FILES) > 300
    assert [line for path in FILES for line in wrong_imports(path)] == []


def test_nothing_above_the_line_imports_torch():
    found = {
        module: heavy
        for path in FILES
        if room(module := module_name(path)) in ABOVE_TORCH and module not in VOLUME_READERS
        if (heavy := {name.split(".")[0] for name in imported_modules(path)} & TORCH_SIDE)
    }
    assert found == {}


def test_the_builders_and_the_package_import_without_torch():
    _, loaded = run_fresh(
        "import biomedclip, biomedclip.cli, biomedclip.shards, biomedclip.layouts, data_builders.build,"
        " biomedclip.training.config, biomedclip.evaluation.config"
    )
    assert loaded & TORCH_SIDE == set()


def test_packages_hold_no_asserts_no_blanket_excepts_and_no_catch_all_modules():
    assert {path.stem for path in FILES}.isdisjoint({"utils", "common", "helpers", "base", "misc"})
    wrong = []
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Assert):
                wrong.append(f"{path}:{node.lineno} asserts")
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            ):
                wrong.append(f"{path}:{node.lineno} catches everything")
    assert wrong == []


def test_every_module_and_public_name_says_what_it_is():
    wrong = []
    for path in FILES:
        body = tree_of(path).body
        if body and not ast.get_docstring(tree_of(path)):
            wrong.append(f"{path} opens without a docstring")
        for node in body:
            is_public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if is_public and not ast.get_docstring(node):
                wrong.append(f"{path}:{node.lineno} {node.name} has no docstring")
    assert wrong == []
