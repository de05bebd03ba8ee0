"""The layer table of the design, as a test over every import, also those inside functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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


def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_room_imports_only_from_rooms_below_it(path):
    module = module_name(path)
    here = room(module)
    if here is None:
        return
    assert here in LEVELS, f"{here} is not in the layer table"
    for name in imported_modules(path):
        there = room(name)
        if there is None or there == here or there not in LEVELS:
            continue
        assert LEVELS[there] < LEVELS[here], f"{module} imports {name}"
        if here == "data_builders":
            assert there in ABOVE_TORCH, f"{module} imports {name}, which stands below the torch line"
        if there == "data_builders":
            assert here in COMMAND_LINE, f"{module} imports {name}; only the command line may"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_above_the_line_imports_torch(path):
    module = module_name(path)
    if room(module) not in ABOVE_TORCH or module in VOLUME_READERS:
        return
    assert not {name.split(".")[0] for name in imported_modules(path)} & TORCH_SIDE


def test_the_builders_and_the_package_import_without_torch():
    script = (
        "import sys, biomedclip, biomedclip.cli, biomedclip.shards, biomedclip.layouts, data_builders.build,"
        " biomedclip.training.config, biomedclip.evaluation.config\n"
        f"print(sorted({TORCH_SIDE!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_packages_hold_no_asserts_no_blanket_excepts_and_no_catch_all_modules(path):
    assert path.stem not in {"utils", "common", "helpers", "base", "misc"}
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"{path}:{node.lineno} asserts"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno} catches everything"
            assert getattr(node.type, "id", "") not in ("Exception", "BaseException"), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_and_public_name_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    if not tree.body:
        return
    assert ast.get_docstring(tree), f"{path} opens without a docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno} {node.name} has no docstring"
