"""A plan of the whole of PMC, simulated: 8 million article versions, one core, time and peak memory of a process.

The article table is made first, outside the measurement, with columns like those of PMC: titles and citations of
usual length, 0 to 12 media with md5, 7 licence codes and none, 6 % second versions, 3 % shared DOIs. Measured are
`make_plan` with every rule in use, reading one unit of the result, and comparing two inventories of the same size,
each in a process of its own whose peak memory the system reports. There is no peer: no public builder makes plans.
`BENCH_ROWS=200000` gives a quick run.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEERS = ()
ROWS = int(os.environ.get("BENCH_ROWS", "8000000"))

MEASURE = """
import json, os, sys, time
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
from pathlib import Path
from data_builders.pmc.diff import diff_tables
from data_builders.pmc.plan import make_plan, read_plan
from data_builders.pmc.plan_rules import PlanConfig
what, folder = sys.argv[1], Path(sys.argv[2])
start = time.perf_counter()
if what == "plan":
    config = PlanConfig(licence="commercial", since="1990", until="2026", sample_rate=0.9)
    facts = make_plan(folder / "articles.parquet", folder / "plan.parquet", config)
    assert facts.seen == facts.planned + sum(facts.excluded.values())
    result = {"planned": facts.planned, "units": facts.units}
elif what == "unit":
    result = {"records": sum(1 for _ in read_plan(folder / "plan.parquet", [int(sys.argv[3])]))}
else:
    result = diff_tables(folder / "old.parquet", folder / "new.parquet", folder / "diff.parquet").counts
result |= {"s": time.perf_counter() - start}
# Not ru_maxrss, which begins with what the parent held when it started this process.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
result |= {"gb": int(peak.split()[1]) * 1024 / 1e9}
print(json.dumps(result))
"""


def write_table(path: Path, rows: int) -> None:
    """An article table of simulated records; texts repeat from batch to batch, ids, checksums and DOIs do not."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_builders.pmc.article_table import TABLE_KEY, table_schema

    schema = table_schema().with_metadata({TABLE_KEY: b'{"snapshot": "2026-11-01T01-00Z"}'})
    codes = np.array(["CC BY"] * 13 + ["CC BY-NC"] * 2 + ["CC BY-NC-ND"] * 3 + ["CC0", "CC BY-NC-SA", "TDM", None])
    words = np.array(["effect", "of", "the", "clinical", "imaging", "patients", "with", "cancer", "cells", "and", "in"])
    dice, step = np.random.default_rng(0), 100_000
    titles = np.array([" ".join(row) for row in words[dice.integers(0, len(words), (step, 15))]])
    numbers = dice.integers(1, 999, step).tolist()
    cited = np.array([f"J Clin Invest. 2020 Sep 1;{v}(9):e70{v}. doi: 10.1172/jci.{v * 7919}" for v in numbers])
    media = dice.integers(0, 13, step)
    files = pa.array([f"OPEN-15-e{i % 99991:05d}-g{i % 13:03d}.jpg" for i in range(int(media.sum()))])
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=["licence", "reason"]) as writer:
        for start in range(0, rows, step):
            n = min(step, rows - start)
            index, total = np.arange(start, start + n), int(media[:n].sum())
            # Every seventeenth article has a second version, one DOI in 33 is shared by two articles.
            version = np.where((index > 0) & (index % 17 == 0), 2, 1)
            pmcid = 13_000 + index - index // 17
            doi_key = dice.integers(2**40, 2**63, n).astype(np.uint64)
            doi_key[::33] = 7 + start + np.arange(len(doi_key[::33])) // 2
            names = [f"PMC{p}.{v}" for p, v in zip(pmcid.tolist(), version.tolist(), strict=True)]
            offsets = pa.array(np.concatenate(([0], np.cumsum(media[:n]))).astype(np.int32))
            md5s, xml_md5 = (
                pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), k, [None, pa.py_buffer(dice.bytes(16 * k))])
                for k in (total, n)
            )
            columns = {
                "article_id": names, "pmcid": pmcid, "version": version, "licence": codes[index * 7919 % len(codes)],
                "is_retracted": index % 5000 == 0, "is_manuscript": index % 9 == 0,
                "published": dice.integers(1985, 2027, n) * 10_000 + dice.integers(1, 13, n) * 100,
                "doi": [f"10.1172/jci.{i}" for i in index.tolist()], "doi_key": doi_key, "pmid": 10_000_000 + index,
                "title": titles[:n], "citation": cited[:n], "xml_name": [f"{name}.xml" for name in names],
                "xml_md5": xml_md5, "media_names": pa.ListArray.from_arrays(offsets, files[:total]),
                "media_md5s": pa.ListArray.from_arrays(offsets, md5s), "num_media": media[:n],
                "num_pictures": media[:n], "item": [None] * n, "reason": [None] * n, "detail": [None] * n,
            }  # fmt: skip
            arrays = [
                column if isinstance(column, pa.Array) else pa.array(column).cast(schema.field(name).type)
                for name, column in columns.items()
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def write_inventory(path: Path, rows: int, changed: int) -> None:
    """An inventory table of `rows` article versions; every `changed`-th has another ETag than the rest of the runs."""
    import duckdb
    import pyarrow.parquet as pq

    sql = f"""COPY (SELECT 'PMC' || i || '.1' AS article_id, i::BIGINT AS pmcid, 1::SMALLINT AS version,
        md5((i + CASE WHEN {changed} > 0 AND i % {changed or 1} = 0 THEN 1 ELSE 0 END)::VARCHAR) AS etag,
        '2026-06-27T19:16:52.000Z' AS last_modified, 2::BIGINT AS keys FROM range(13000, {13000 + rows}) t(i))
        TO '{path}.raw' (FORMAT parquet)"""
    with duckdb.connect(config={"memory_limit": "1GB"}) as database:
        database.execute(sql)
    facts = {"snapshot": "2026-11-01T01-00Z", "articles": rows, "keys": rows, "other_keys": 0}
    with pq.ParquetFile(f"{path}.raw") as raw:
        schema = raw.schema_arrow.with_metadata({b"biomedclip_inventory": json.dumps(facts).encode()})
        with pq.ParquetWriter(path, schema) as writer:
            for batch in raw.iter_batches(100_000):
                writer.write_batch(batch.cast(schema))
    Path(f"{path}.raw").unlink()


def measure(what: str, folder: Path, *arguments: str) -> dict:
    """Seconds, peak memory and result of one step in a process of its own, held to one core."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ARROW_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, what, str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(rows: int) -> dict:
    """Plan, one unit and a comparison of inventories, over `rows` simulated article versions."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        write_table(folder / "articles.parquet", rows)
        write_inventory(folder / "old.parquet", rows, 0)
        write_inventory(folder / "new.parquet", rows + rows // 1000, 500)
        print(f"simulated {rows} rows in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        plan = measure("plan", folder)
        unit = measure("unit", folder, str(plan["units"] - 1))
        diff = measure("diff", folder)
        sizes = {path.stem: path.stat().st_size for path in folder.glob("*.parquet")}
    return {
        "rows": rows, "planned": plan["planned"],
        "plan_8m_s": round(plan["s"], 1), "plan_8m_gb": round(plan["gb"], 2),
        "read_one_unit_s": round(unit["s"], 2), "read_one_unit_gb": round(unit["gb"], 2),
        "diff_8m_s": round(diff["s"], 1), "diff_8m_gb": round(diff["gb"], 2),
        "diff_changed": diff.get("changed", 0), "diff_new": diff.get("new", 0),
        "article_table_gb": round(sizes["articles"] / 1e9, 2), "plan_file_gb": round(sizes["plan"] / 1e9, 2),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps({"benchmark": "pmc_plan", "figures": measure_all(ROWS)}))
