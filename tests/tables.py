"""The table of docs/models.md from the zoo: `python tests/tables.py` writes it, a test says whether it is current."""

from __future__ import annotations

from pathlib import Path

from biomedclip.models.catalog import describe_access
from biomedclip.models.zoo import ReleasedModel, read_zoo

BEGIN, END = "<!-- table of models: begin -->\n", "<!-- table of models: end -->\n"
PAGE = Path(__file__).parent.parent / "docs" / "models.md"
HEAD = ("model", "licence", "access", "files pinned", "how it was checked", "remains unverified")


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
    checked = {
        "documented": "not loaded",
        "layout-tested": f"random weights in the published layout against {model.compared_with}",
        "weights-tested": f"published weights against {model.compared_with}",
    }[model.status]
    return (
        f"[{model.name}](../model_cards/{model.name}.md)", model.licence.name or model.licence.id,
        describe_access(model.source.model_dump()), f"{pinned} of {len(weights)}", checked,
        "; ".join(line.replace("|", "/") for line in model.unverified),
    )  # fmt: skip


if __name__ == "__main__":
    PAGE.write_text(models_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
