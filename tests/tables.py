"""What is written from the zoo: `python tests/tables.py` writes it, tests say whether it is current.

The sizes and hashes of what comes with the package (in its YAML file), the table of docs/models.md, and every card.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from biomedclip.files import sha256_file
from biomedclip.models.cards import released_card
from biomedclip.models.catalog import bundled_folder, describe_access, list_names, plain_facts, zoo_folder
from biomedclip.models.zoo import ReleasedModel, read_zoo

BEGIN, END = "<!-- table of models: begin -->\n", "<!-- table of models: end -->\n"
ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
HEAD = ("model", "licence", "access", "files pinned", "how it was checked", "remains unverified")


def pinned_text(name: str) -> str:
    """A bundled model's YAML file with size and sha256 of the files that lie in its folder."""
    text = (zoo_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    facts = yaml.safe_load(text)
    lines = []
    for file in facts["files"]:
        path = bundled_folder(facts["source"]["folder"]) / file["paths"][0]
        known = {**file, "size": path.stat().st_size, "sha256": sha256_file(path)}
        dumped = yaml.safe_dump([known], sort_keys=False, default_flow_style=None)
        lines += [f"  {line}\n" for line in dumped.rstrip("\n").split("\n")]
    return re.sub(r"(?m)^files:\n(?:[ -].*\n)+", "files:\n" + "".join(lines), text)


def bundled_names() -> list[str]:
    """Names of the models that come with the package."""
    return [name for name in list_names() if plain_facts(name)["source"]["kind"] == "bundled"]


def models_page(text: str) -> str:
    """The page with the table between its marks written anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + models_table() + END + after


def models_table() -> str:
    """One row a model, Markdown."""
    rows = [HEAD, tuple("---" for _ in HEAD), *(_row(model) for model in read_zoo())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(model: ReleasedModel) -> tuple[str, ...]:
    weights = model.files_of("weights")
    pinned = sum(1 for file in weights if file.sha256 or file.md5)
    whose = "bundled" if model.source.kind == "bundled" else "published"
    checked = {
        "documented": "not loaded",
        "layout-tested": f"random weights in the published layout against {model.compared_with}",
        "weights-tested": f"{whose} weights against {model.compared_with}",
    }[model.status]
    return (
        f"[{model.name}](../model_cards/{model.name}.md)", model.licence.name or model.licence.id,
        describe_access(model.source.model_dump()), f"{pinned} of {len(weights)}", checked,
        "; ".join(line.replace("|", "/") for line in model.unverified) or "nothing",
    )  # fmt: skip


if __name__ == "__main__":
    for name in bundled_names():
        (zoo_folder() / f"{name}.yaml").write_text(pinned_text(name), encoding="utf-8")
    PAGE.write_text(models_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for model in read_zoo():
        (ROOT / "model_cards" / f"{model.name}.md").write_text(released_card(model), encoding="utf-8")
