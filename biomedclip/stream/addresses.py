"""Addresses of remote files: what is asked for a URL, what may be sent there, and where a redirect may lead.

Takes `https://`, `http://`, `hf://datasets/…` and `s3://` URLs and gives plain addresses with the headers that only
their host may see. A redirect never changes the scheme, and takes no token to another host.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, unquote, urljoin, urlsplit

from biomedclip.errors import ConfigError, DataError, MissingExtra
from biomedclip.stream.faults import Fault
from biomedclip.stream.transport import Answer

_SCHEMES = ("https", "http", "hf", "s3")
_MAX_HOPS = 5


def is_remote(path: str | Path) -> bool:
    """Whether a source's path is a URL."""
    return re.match(r"[a-z0-9]+://", str(path)) is not None


def resolve(url: str) -> tuple[str, Mapping[str, str]]:
    """The address that is asked for a URL, and the headers that only its host may see.

    `hf://datasets/owner/name@revision/path` follows the Hub's own rules for address, token and offline mode;
    `s3://bucket/key` is the object's public address. Raises ConfigError for what cannot be asked for.
    """
    scheme = url.partition("://")[0]
    parts = urlsplit(url)
    if scheme not in _SCHEMES:
        raise ConfigError(shown(url), "is of a kind that cannot be read by range", found=scheme,
                          todo=f"use one of {', '.join(_SCHEMES)}")  # fmt: skip
    if "@" in parts.netloc:
        raise ConfigError(shown(url), "holds a password", todo="leave it out; nothing is sent but the Hub's own token")
    if scheme == "hf":
        return _resolve_hub(url)
    if scheme == "s3":
        bucket, key = parts.netloc, quote(url.split("/", 3)[3] if url.count("/") > 2 else "", safe="/!-_.*'()~")
        endpoint = _s3_endpoint()
        if endpoint:
            return f"{endpoint.rstrip('/')}/{bucket}/{key}", {}
        # A dot in the bucket's name does not fit the wildcard of the service's certificate.
        return (f"https://s3.amazonaws.com/{bucket}/{key}" if "." in bucket
                else f"https://{bucket}.s3.amazonaws.com/{key}"), {}  # fmt: skip
    return url, {}


def _resolve_hub(url: str) -> tuple[str, Mapping[str, str]]:
    found = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", url)
    if not found:
        raise ConfigError(url, "is no address of a file in a data set", todo="write hf://datasets/owner/name/path")
    try:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers
    except ImportError:
        raise MissingExtra("train", "huggingface_hub") from None
    if constants.HF_HUB_OFFLINE:
        raise DataError(url, "cannot be read: HF_HUB_OFFLINE is set", todo="unset it, or name a local folder")
    revision = unquote(found[2]) if found[2] else None
    headers = build_hf_headers(library_name="biomedclip")
    sent = {name: value for name, value in headers.items() if name.lower() == "authorization"}
    return hf_hub_url(found[1], found[3], repo_type="dataset", revision=revision, endpoint=hub()), sent


def sign(url: str) -> str | None:
    """The address of an `s3://` object that is not public, signed with the AWS credentials found here for one hour.

    None where there are no credentials, or botocore is not installed. Signing asks nobody, so that reading goes the way
    of all other addresses.
    """
    parts = urlsplit(url)
    client = _s3_client(os.getpid())
    if parts.scheme != "s3" or client is None:
        return None
    key = url.split("/", 3)[3]
    wanted = {"Bucket": parts.netloc, "Key": key}
    return str(client.generate_presigned_url("get_object", Params=wanted, ExpiresIn=3600))


@lru_cache(maxsize=1)
def _s3_client(process: int) -> Any:
    try:
        import botocore.config
        import botocore.session
    except ImportError:
        return None
    session = botocore.session.get_session()
    if session.get_credentials() is None:
        return None
    endpoint = _s3_endpoint()
    style = {"addressing_style": "path" if endpoint else "auto"}
    region = session.get_config_variable("region") or "us-east-1"
    options = botocore.config.Config(signature_version="s3v4", s3=style)
    return session.create_client("s3", region_name=region, endpoint_url=endpoint, config=options)


def _s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def hub() -> str:
    """The address of the Hugging Face Hub, or of the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def follow(url: str, target: str, answer: Answer, own: Mapping[str, str], hops: int) -> tuple[str, Mapping[str, str]]:
    """Where a redirect leads, and what may be sent there."""
    there = urljoin(target, answer.headers.get("Location") or "")
    if hops > _MAX_HOPS or there == target:
        refuse(url, "is redirected in circles", f"{hops} times")
    if urlsplit(there).scheme != urlsplit(target).scheme:
        refuse(url, "is redirected to another scheme, which is not followed", shown(there), "name that address")
    same_host = urlsplit(there).netloc == urlsplit(target).netloc
    return there, own if same_host else {}


def shown(url: str) -> str:
    """A URL as messages show it: without a query, which may hold a signature, and without a password."""
    parts = urlsplit(url)
    return parts._replace(query="", fragment="", netloc=parts.netloc.rpartition("@")[2]).geturl()


def refuse(
    url: str, wrong: str, found: str | None = None, todo: str | None = None, kind: type[Fault] = Fault
) -> NoReturn:
    """Raise the Fault that says so of a URL."""
    raise kind(shown(url), wrong, found=found, todo=todo)
