"""Docs cannot drift: every command is documented, every command shown exists and parses, every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from biomedclip import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "model_cards").glob("*.md"))]
COMMANDS = typer.main.get_command(cli.app).commands
SHOWN = sorted(
    {
        (page.relative_to(ROOT).as_posix(), line.strip().removeprefix("$ "))
        for page in PAGES
        for block in re.findall(r"```(?:bash|console|sh)\n(.*?)```", page.read_text(), flags=re.S)
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip().removeprefix("$ ").startswith(("biomedclip ", "make "))
    }
)


def test_commands_are_shown_at_all():
    assert len(SHOWN) >= 6


@pytest.mark.parametrize(("page", "line"), SHOWN)
def test_a_shown_command_exists_and_its_options_parse(page, line):
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert words[1] in targets
        return
    group: object = typer.main.get_command(cli.app)
    rest = words[1:]
    while rest and hasattr(group, "commands") and rest[0] in group.commands:
        group, rest = group.commands[rest[0]], rest[1:]
    if rest and rest[0].startswith("--"):
        known = {option for parameter in group.params for option in parameter.opts} | {"--help"}
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known
        return
    if getattr(group, "invoke_without_command", False) and not rest:
        return
    assert not hasattr(group, "commands"), f"{line}: no such command"
    group.make_context(words[1], list(rest), resilient_parsing=False)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_documented(name):
    assert any(f"biomedclip {name}" in page.read_text() for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_configs_named_in_the_docs_exist():
    for page in PAGES:
        for name in re.findall(r"configs/[a-z]+/[a-z0-9_-]+\.yaml", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
