"""The page on a port of this machine: Gradio without its telemetry, behind the gate, with a folder that goes away.

`open_page` sets what Gradio reads from the environment before it is imported, takes the port, builds the page and
serves it until Ctrl-C. uvicorn is run here and not by Gradio's `launch`, which asks its own server over HTTP whether
it is there, may look for another port than the one that was asked for, and records runs. Uploads and every picture
that the page shows lie in a private folder (mode 700) that is deleted when the command ends, however it ends.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from biomedclip.app.gate import LOOPBACK, Asgi, Gate
from biomedclip.app.holdings import Holdings
from biomedclip.errors import ConfigError, MissingExtra

_SETTINGS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_SSR_MODE": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
_SHUTDOWN_S = 1
"""A browser that is still open holds its event stream forever; it is not waited for."""


def open_page(
    holdings: Holdings, *, host: str = "127.0.0.1", port: int = 7860, max_upload_mb: int = 50,
    say: Callable[[str], None] = print, warn: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Serve the page until Ctrl-C or SIGTERM. `say` gets the address, `warn` what the user should know.

    Raises ConfigError where the address cannot be had and MissingExtra without Gradio.
    """
    with listen(host, port) as listener, private_folder() as folder:
        if not is_loopback(host):
            warn(
                f"warning: {host} opens the page to other machines; whoever reaches it may read the folders that are "
                "given here and use the model, there is no password, and nothing is encrypted"
            )
        app = make_app(holdings, folder, host=host, max_upload_mb=max_upload_mb)
        shown = f"[{host}]" if ":" in host else host
        say(f"biomedclip page: http://{shown}:{listener.getsockname()[1]}\nCtrl-C ends it. For research only.")
        _serve(app, listener)


def make_app(holdings: Holdings, folder: Path, *, host: str = "127.0.0.1", max_upload_mb: int = 50) -> Asgi:
    """The page as an ASGI application; whatever it writes goes into `folder`."""
    os.environ.update(_SETTINGS | {"GRADIO_TEMP_DIR": str(folder), "GRADIO_EXAMPLES_CACHE": str(folder / "examples")})
    try:
        import fastapi
        import gradio
    except ImportError as error:
        raise MissingExtra("app", error.name or "gradio") from None
    from biomedclip.app.page import CSS, ICON, build_page, make_theme

    inner = gradio.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None), build_page(holdings), "/",
        server_name=host, footer_links=[], run_history=False, show_error=False, allowed_paths=[],
        max_file_size=max_upload_mb * 1_000_000, ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False,
        theme=make_theme(), css=CSS, favicon_path=str(ICON),
    )  # fmt: skip
    return Gate(inner, folder, LOOPBACK | {host} if is_loopback(host) else None)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket; port 0 takes a free one. Raises ConfigError where the port is taken or the host not ours."""
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ConfigError("--host", "is no address", found=repr(host), todo="leave it out, or name 0.0.0.0") from None
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise _explain(error, host, port) from None
        listener.listen(128)
        yield listener


def _explain(error: OSError, host: str, port: int) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError("--port", "is in use by another program", found=port, todo="name another, or 0 for any")
    if error.errno == errno.EACCES:
        return ConfigError("--port", "needs rights that you do not have", found=port, todo="name one from 1024 on")
    return ConfigError("--host", "is no address of this machine", found=repr(host), todo="leave it out")


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder that only this user can read, deleted at the end with everything in it."""
    folder = Path(tempfile.mkdtemp(prefix="biomedclip-page-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve(app: Asgi, listener: socket.socket) -> None:
    import uvicorn

    # Gradio prints what goes wrong in its own calls; uvicorn would report every browser that is left open at the end.
    settings: dict[str, Any] = {"log_level": "critical", "access_log": False, "server_header": False}
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=_SHUTDOWN_S, **settings))
    # uvicorn shuts down on SIGTERM and raises it again, which by default ends the process before the folder is gone.
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise KeyboardInterrupt
