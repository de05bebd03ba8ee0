"""The table of recipes in `recipes/README.md`, which a test compares with the recipes.

Reads the project's recipes and yields Markdown between two marks of the page; the prose around them is written by hand.
"""

from __future__ import annotations

from pathlib import Path

from biomedclip.errors import DataError
from biomedclip.files import write_text
from data_builders.labels.recipe import Recipe, load_recipe, recipe_folder, recipe_names

BEGIN, END = "<!-- table of recipes: begin -->", "<!-- table of recipes: end -->"


def recipe_table() -> str:
    """One Markdown row a recipe of the project: name, modality, kind, classes, licence, access, verified."""
    lines = ["| recipe | modality | kind | classes | licence | access | verified |", "|---|---|---|---:|---|---|---|"]
    for recipe in map(load_recipe, recipe_names()):
        access = f"[{recipe.access.kind}]({recipe.access.url})" if recipe.access else ""
        cells = (f"[{recipe.name}]({recipe.name}.yaml)", recipe.modality, recipe.kind, str(len(recipe.labels)),
                 recipe.licence.code, access, verified_words(recipe))  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verified_words(recipe: Recipe) -> str:
    """What of a recipe was checked: `classes, counts`, one of them, or `no`."""
    counts = recipe.expect is not None and recipe.expect.verified
    return ", ".join(word for word, is_so in (("classes", recipe.verified), ("counts", counts)) if is_so) or "no"


def write_page(path: Path | None = None) -> None:
    """Put the table of today's recipes into the page. Raises DataError where its marks are gone."""
    path = path or recipe_folder() / "README.md"
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(path, "has not both marks of the table", todo=f"put {BEGIN} and {END} where it belongs")
    write_text(path, f"{before}{BEGIN}\n{recipe_table()}\n{END}{after}")
