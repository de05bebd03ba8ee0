"""Runs one benchmark with its peers in an environment of their own; the last line printed is one JSON object.

    python tests/benchmarks/run.py shards

`bench_<name>.py` lists its peers in a literal `PEERS = ("webdataset==1.0.2",)`. They are installed into
`.bench/<name>`, never beside this project: several peers pin old versions of what we use. The benchmark finds the
peers' Python in the environment variable `PEER_PYTHON` and runs them in a process of their own.
"""

import ast
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def read_peers(path: Path) -> tuple[str, ...]:
    """The literal PEERS of a benchmark, read without importing it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PEERS":
            return tuple(ast.literal_eval(node.value))
    raise SystemExit(f"{path}: has no PEERS; list the packages it compares with, or ()")


def make_peer_python(name: str, peers: tuple[str, ...]) -> Path:
    """Python of an environment that holds the peers; made once for each list of peers."""
    identity = hashlib.sha256(repr(peers).encode()).hexdigest()[:8]
    # Benchmarks with the same peers share their environment, which may be gigabytes.
    made = [path for path in (ROOT / ".bench").glob(f"*-{identity}") if (path / ".ready").exists()]
    folder = made[0] if made else ROOT / ".bench" / f"{name}-{identity}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        print(f"installing {', '.join(peers)} into {folder.relative_to(ROOT)}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *peers], check=True)
        ready.touch()
    return python


def main() -> None:
    """Run the benchmark named on the command line."""
    names = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    if len(sys.argv) != 2 or sys.argv[1] not in names:
        raise SystemExit(f"say which benchmark: {', '.join(names)}")
    name = sys.argv[1]
    path = HERE / f"bench_{name}.py"
    peers = read_peers(path)
    environment = dict(os.environ)
    if peers:
        environment["PEER_PYTHON"] = str(make_peer_python(name, peers))
    raise SystemExit(subprocess.run([sys.executable, path], env=environment).returncode)


if __name__ == "__main__":
    main()
