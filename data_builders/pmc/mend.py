"""What a second reading of articles mends: the figures that failed before, and only those.

Reads the ledger of a unit and what its failed articles yield today; yields what belongs into the delta unit and notes
which rows that replaces. An article whose XML had failed is taken as a whole. Of any other, only the figures that had
failed are: their siblings are in the unit already and stay as they are. A figure that fails for the same reason again
is left alone, so a retry that mends nothing writes nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from biomedclip.schema import Article, Drop, Pair
from data_builders.units import LedgerKey, UnitRecord, live_rows

Row = tuple[str | None, str | None]
"""Reason and key of a ledger row: what tells rows of one figure apart."""


@dataclass(slots=True)
class FailedArticle:
    """The ledger rows of one article, by item."""

    failed: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Item -> reasons that a retry may mend."""
    settled: dict[str, Counter[Row]] = field(default_factory=lambda: defaultdict(Counter))
    """Item -> rows that stay."""


def failed_articles(records: Sequence[UnitRecord], reasons: Collection[str]) -> dict[str, FailedArticle]:
    """Article id -> its rows, of the articles of a unit and its deltas that have a row of one of these reasons."""
    articles: dict[str, FailedArticle] = defaultdict(FailedArticle)
    for row in live_rows(records).to_pylist():
        article = articles[row["article_id"]]
        if row["reason"] in reasons:
            article.failed[row["item"]][row["reason"]] += 1
        else:
            article.settled[row["item"]][row["reason"], row["key"]] += 1
    return {article_id: article for article_id, article in articles.items() if article.failed}


class Mend:
    """One retry of a unit: `items` are those of its delta, and `supersedes`, complete after them, what they replace."""

    def __init__(self, articles: Mapping[str, FailedArticle]) -> None:
        self.supersedes: list[LedgerKey] = []
        self._articles = articles

    def items(self, groups: Iterable[Iterable[Article | Pair | Drop]]) -> Iterator[Article | Pair | Drop]:
        """What is new, of groups that each hold all that one failed article yields now, its Article first."""
        for group in groups:
            yield from self._compare(list(group))

    def _compare(self, items: list[Article | Pair | Drop]) -> list[Article | Pair | Drop]:
        facts = [item for item in items if isinstance(item, Article)]
        found = [item for item in items if not isinstance(item, Article)]
        article_id = items[0].article_id or ""
        article = self._articles[article_id]
        chosen: list[int] = []
        is_mended = False
        for item, reasons in article.failed.items():
            if item == article_id:
                new = list(range(len(found)))
                is_complete = bool(facts) or bool(found)
            else:
                new = _unsettled(found, item, article.settled.get(item, Counter()))
                # Fewer rows than failed: the XML cannot be read today, which says nothing of the figure.
                is_complete = len(new) >= reasons.total()
            if is_complete and Counter(_row(found[n])[0] for n in new) != reasons:
                self.supersedes += [(article_id, item, reason) for reason in sorted(reasons.elements())]
                chosen += new
                is_mended = True
        # With the Article, from which pairs have their date; readers of the article table take its first row.
        return [*facts, *(found[n] for n in sorted(chosen))] if is_mended else []


def _unsettled(found: list[Pair | Drop], item: str, settled: Counter[Row]) -> list[int]:
    """Positions of the rows of a figure that the unit does not hold yet."""
    left = settled.copy()
    new = []
    for number, row in enumerate(found):
        if (row.item if isinstance(row, Drop) else row.figure_id or row.key) != item:
            continue
        if left[_row(row)] > 0:
            left[_row(row)] -= 1
        else:
            new.append(number)
    return new


def _row(item: Pair | Drop) -> Row:
    return (item.reason, None) if isinstance(item, Drop) else (None, item.key)
