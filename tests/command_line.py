"""The command line in this process: what a user types and reads, without the second that a new Python takes."""

import contextlib
import io
import subprocess
import sys
from unittest import mock

from biomedclip import cli


def run_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Exit code, standard output and standard error of `biomedclip ARGUMENTS`, as `subprocess.run` gives them."""
    words = [str(argument) for argument in arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["biomedclip", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else int(done.code is not None)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
