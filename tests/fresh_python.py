"""A new Python, and what it has imported: for promises of what a command does without."""

import subprocess
import sys

_LOADED = "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"


def run_fresh(script: str) -> tuple[str, set[str]]:
    """Standard output of a script in a process of its own, and the packages and modules that are loaded at its end."""
    done = subprocess.run([sys.executable, "-c", script + _LOADED], capture_output=True, text=True, check=True)
    return done.stdout, set(done.stderr.strip().split("\n")[-1].split())
