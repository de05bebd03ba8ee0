"""The exceptions a user can meet, and the one form their messages take.

    BiomedclipError
    ├── ConfigError       a run config, option or override the user must change
    ├── DataError         a source, figure, shard or manifest that breaks its contract
    ├── CheckpointError   weights that are missing, changed or do not fit
    └── MissingExtra      an optional package is needed; says the pip line

Every message reads `where: what is wrong (what was found); what to do`. The command line prints it as one line and
exits with 2, because all four mean that the user has to change something; any other exception is a defect of ours,
keeps its traceback and exits with 1.
"""

from __future__ import annotations

from pathlib import Path


class BiomedclipError(Exception):
    """An error whose text says where it happened, what is wrong, what was found and what to do."""

    def __init__(self, where: str | Path, wrong: str, *, found: object | None = None, todo: str | None = None) -> None:
        self.where, self.wrong, self.found, self.todo = str(where), wrong, found, todo
        text = f"{self.where}: {wrong}"
        if found is not None:
            text += f" (found {found})"
        if todo is not None:
            text += f"; {todo}"
        super().__init__(text)

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes send exceptions back by pickle, which would drop keyword arguments.
        return _rebuild, (type(self), self.where, self.wrong, self.found, self.todo)


def _rebuild(
    kind: type[BiomedclipError], where: str, wrong: str, found: object | None, todo: str | None
) -> BiomedclipError:
    return kind(where, wrong, found=found, todo=todo)


class ConfigError(BiomedclipError):
    """A run config, option or override the user must change."""


class DataError(BiomedclipError):
    """A source, figure, shard or manifest that breaks its contract."""


class CheckpointError(BiomedclipError):
    """Weights that are missing, changed or do not fit the model."""


class MissingExtra(BiomedclipError):
    """An optional package is needed.

    `MissingExtra("train", "lightning")` says which extra of this project brings the package.
    """

    def __init__(
        self,
        extra: str,
        package: str,
        *,
        found: object | None = None,
        todo: str | None = None,
    ) -> None:
        super().__init__(
            package,
            "this step needs it and it is not installed",
            found=found,
            todo=todo or f"run: pip install 'biomedclip[{extra}]'",
        )
        self.extra = extra

    def __reduce__(self) -> tuple[object, ...]:
        return MissingExtra, (self.extra, self.where)
