"""A DuckDB predicate and a stream of rows in, one yes or no a row out: the `where` of a selection or a source.

The predicate is what its author thinks of as a condition over columns, and is kept to that: it is parsed first, and
refused where it is more than one expression, reads a table or calls a function whose answer changes from run to run.
It then runs on an in-memory database that may open no file, no network and no extension, and whose settings are locked.
All rows are one table to it, in order, so `row_number() over (partition by article_id) <= 5` means what it says.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from biomedclip.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    import pyarrow as pa

_SANDBOX: dict[str, Any] = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
    "threads": "1",  # rows reach window functions in order
}
_POSITION = "__row"
_CLOCKS = {"current_time", "current_timestamp", "localtime", "localtimestamp"}
"""Words of SQL that DuckDB lists as functions under other names."""
_UNSTABLE = "SELECT list(DISTINCT lower(function_name)) FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"


def check_predicate(predicate: str, where: str = "where") -> set[str]:
    """Names of the columns that a predicate speaks of. Raises ConfigError where it is not one plain condition."""
    if not predicate.strip():
        raise ConfigError(where, "is empty", todo="write a condition such as width >= 224, or leave it out")
    with _connect() as connection:
        tree = json.loads(_answer(connection, "SELECT json_serialize_sql(?)", [f"SELECT ({predicate}\n) AS answer"]))
        unstable = _CLOCKS | set(_answer(connection, _UNSTABLE, []))
    if tree["error"]:
        raise ConfigError(where, "is no SQL condition", found=repr(predicate), todo=str(tree["error_message"]))
    nodes = list(_walk(tree["statements"]))
    if len(tree["statements"]) != 1 or {"SUBQUERY", "STAR"} & {node.get("class") for node in nodes}:
        raise ConfigError(where, "must be one condition over the columns of a row", found=repr(predicate),
                          todo="leave out SELECT and *")  # fmt: skip
    columns = {str(node["column_names"][0]) for node in nodes if node.get("class") == "COLUMN_REF"}
    functions = {str(node["function_name"]) for node in nodes if node.get("function_name")}
    changing = sorted(unstable & {name.lower() for name in columns | functions})
    if changing:
        raise ConfigError(where, "must give the same answer in every run", found=changing[0],
                          todo="sample with hash(key) instead of random(); name dates")  # fmt: skip
    return columns


def check_columns(wanted: Iterable[str], known: Sequence[str], where: str = "where") -> None:
    """Raise ConfigError where a predicate speaks of a column that is not known; DuckDB ignores the case of names."""
    folded = {name.lower() for name in known}
    for name in sorted(wanted):
        if name.lower() not in folded:
            near = difflib.get_close_matches(name.lower(), sorted(folded), n=1)
            hint = f"did you mean {near[0]}?" if near else f"columns: {', '.join(sorted(known))}"
            raise ConfigError(where, f"there is no column {name}", todo=hint)


def rows_where(
    predicate: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch], where: str = "where"
) -> np.ndarray:
    """(N,) bool: the rows of all batches for which a predicate is true; where it is null, it is not.

    Raises ConfigError for an unknown column, with the nearest one, and with DuckDB's own message where the predicate
    does not fit the columns or fails on a row.
    """
    import duckdb
    import pyarrow as pa

    check_columns(check_predicate(predicate, where), schema.names, where)
    numbered = schema.append(pa.field(_POSITION, pa.int64()))
    stream = pa.RecordBatchReader.from_batches(numbered, _number_rows(batches, numbered))
    try:
        condition = duckdb.SQLExpression(predicate).cast("BOOLEAN").alias("answer")
        with _connect() as connection:
            rows = connection.from_arrow(stream).select(duckdb.ColumnExpression(_POSITION), condition)
            answers = rows.to_arrow_table()
    except duckdb.Error as error:
        raise ConfigError(where, "cannot be asked of the rows", found=repr(predicate), todo=_one_line(error)) from None
    found = np.zeros(answers.num_rows, dtype=np.bool_)
    found[answers[_POSITION].to_numpy()] = answers["answer"].fill_null(False).to_numpy()
    return found


def _number_rows(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    start = 0
    for batch in batches:
        numbers = pa.array(np.arange(start, start + batch.num_rows))
        yield pa.RecordBatch.from_arrays([*batch.columns, numbers], schema=schema)
        start += batch.num_rows


def _connect() -> Any:
    try:
        import duckdb
    except ImportError:
        raise MissingExtra("build", "duckdb") from None
    connection = duckdb.connect(":memory:", config=_SANDBOX)
    connection.execute("SET lock_configuration = true")
    return connection


def _walk(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, dict):
        yield node
        for child in node.values():
            yield from _walk(child)
    elif isinstance(node, list):
        for child in node:
            yield from _walk(child)


def _answer(connection: Any, query: str, values: list[str]) -> Any:
    return connection.execute(query, values).fetchone()[0]


def _one_line(error: Exception) -> str:
    """DuckDB's message without its drawing of where in the query it was."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("LINE ", "^")))[:300]
