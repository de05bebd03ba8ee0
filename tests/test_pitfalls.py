"""The thirty pitfalls of docs/evaluation.md: each names a test, and the test is there."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = re.findall(
    r"^\| (\d+) \| .+ \| .+ \| `(test_\w+\.py)::(test_\w+)` \|$",
    (TESTS.parent / "docs" / "evaluation.md").read_text(encoding="utf-8"),
    flags=re.M,
)


def test_every_pitfall_names_a_test_that_exists():
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 31))
    missing = [
        f"{file}::{name}"
        for _, file, name in ROWS
        if not re.search(rf"^def {name}\(", (TESTS / file).read_text(encoding="utf-8"), flags=re.M)
    ]
    assert missing == []
