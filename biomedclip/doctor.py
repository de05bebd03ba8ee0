"""What is installed, what is missing, and the pip line for it.

Reads the installed distributions and this project's own requirements, so that the table can never disagree with
pyproject.toml. Imports nothing heavy itself: whether torch and torchvision fit together, the one fault that breaks
every import after it, is tried in a process of its own.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

EXTRAS = ("core", "build", "train", "eval", "app", "ray", "dev")
_REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9_.-]+)(?:\[[^]]*\])?(?P<floor>[^;]*)(?:;\s*(?P<marker>.*))?$")
_EXTRA = re.compile(r"""extra\s*==\s*['"](?P<extra>[^'"]+)['"]""")


@dataclass(frozen=True, slots=True)
class Package:
    """One requirement of one extra; `installed` is None where the package is absent."""

    extra: str
    name: str
    floor: str
    installed: str | None

    @property
    def is_old(self) -> bool:
        """Whether the installed version stands below the floor."""
        if self.installed is None or not self.floor.startswith(">="):
            return False
        return version_key(self.installed) < version_key(self.floor.removeprefix(">="))


def version_key(version: str) -> tuple[int, ...]:
    """Leading numbers of a version, for comparison: `2.15.0+cu132` -> (2, 15, 0)."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = re.match(r"\d+", part)
        if digits is None:
            break
        numbers.append(int(digits.group()))
    return tuple(numbers)


def list_packages() -> list[Package]:
    """Every requirement of this distribution, by extra, with the version that is installed."""
    return [_package(requirement) for requirement in metadata.requires("biomedclip") or [] if _keep(requirement)]


def _keep(requirement: str) -> bool:
    return not requirement.startswith("biomedclip")


def _package(requirement: str) -> Package:
    match = _REQUIREMENT.match(requirement)
    if match is None:
        return Package("core", requirement, "", None)
    extra = _EXTRA.search(match["marker"] or "")
    try:
        installed: str | None = metadata.version(match["name"])
    except metadata.PackageNotFoundError:
        installed = None
    return Package(extra["extra"] if extra else "core", match["name"], match["floor"].strip(" ()"), installed)


def find_problems(packages: list[Package]) -> list[str]:
    """What would break a run here, one line each with its remedy; empty on a sound installation."""
    return [*_broken_packages(packages), *_broken_torch(packages), *_broken_files()]


def _broken_packages(packages: list[Package]) -> Iterator[str]:
    for package in packages:
        if package.extra == "core" and package.installed is None:
            yield f"{package.name}: is not installed; run: pip install '{package.name}{package.floor}'"
        if package.is_old:
            yield (
                f"{package.name}: is too old (found {package.installed}, needs {package.floor});"
                f" run: pip install --upgrade '{package.name}{package.floor}'"
            )


def _broken_torch(packages: list[Package]) -> Iterator[str]:
    installed = {package.name: package.installed for package in packages}
    if installed.get("torch") is None or installed.get("torchvision") is None:
        return
    done = subprocess.run([sys.executable, "-c", "import torch, torchvision"], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield (
            f"torchvision: does not import beside this torch (found torch {installed['torch']}, torchvision"
            f" {installed['torchvision']}: {reason}); run: pip install --force-reinstall torch torchvision"
        )


def _broken_files() -> Iterator[str]:
    from biomedclip.config import config_file
    from biomedclip.errors import ConfigError

    try:
        config_file("train/demo.yaml")
    except ConfigError:
        yield "biomedclip: its configs are not installed; run: pip install --force-reinstall biomedclip"


def describe_machine() -> dict[str, str]:
    """Python, operating system, cores, memory, free disk and GPU, as text."""
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": _memory(),
        "free disk": f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB here",
        "gpu": _gpu(),
    }


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def _gpu() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none found (everything also runs on a CPU)"
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    return done.stdout.strip().replace("\n", "; ") or "nvidia-smi shows none"
