"""A folder of a model to a repository of the Hub, by huggingface_hub, where its licence lets it go there."""

from __future__ import annotations

from pathlib import Path

from biomedclip.errors import CheckpointError, ConfigError
from biomedclip.models.build import Parts


def check_may_push(parts: Parts, *, private: bool) -> None:
    """Raise ConfigError where a released model's licence does not say that it may be passed on publicly."""
    facts = parts.facts
    if facts is None or private or facts.licence.redistribution is True:
        return
    raise ConfigError(
        facts.name, "may not be pushed to a public repository: its licence does not say that it may be passed on",
        found=f"{facts.licence.name or facts.licence.id}, {facts.licence.evidence}",
        todo="push it to a private one (--private), or export it only",
    )  # fmt: skip


def push_folder(folder: str | Path, repo: str, *, private: bool) -> str:
    """Upload all files of a folder in one commit; returns the commit's address. Raises CheckpointError."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Export of biomedclip")
    except hub.HFValidationError as error:
        raise CheckpointError(repo, "is no name of a Hub repository", found=str(error)[:120]) from None
    except (hub.LocalTokenNotFoundError, hub.HfHubHTTPError, hub.OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            repo, "could not be written", found=" ".join(str(error).split())[:200],
            todo="log in with a token that may write: hf auth login",
        ) from error  # fmt: skip
    return str(commit.commit_url)
