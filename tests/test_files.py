import json
import os
import signal
import subprocess
import sys
import time

import pytest

from biomedclip.files import remove_leftovers, sha256_file, sha256_json, write_atomic, write_json, write_text


def test_a_file_appears_only_when_its_block_ends(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with write_atomic(path) as file:
        file.write(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


def test_a_failing_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail():
        with write_atomic(path) as file:
            file.write(b"half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_refuses_what_other_readers_refuse(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    write_json(tmp_path / "b.json", {"µ": [1]})
    assert json.loads((tmp_path / "b.json").read_text()) == {"µ": [1]}


def test_hashes_do_not_depend_on_key_order(tmp_path):
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    write_text(tmp_path / "x", "abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_killed_writer_leaves_only_a_leftover_that_the_next_run_removes(tmp_path):
    script = (
        "import sys, time\nfrom biomedclip.files import write_atomic\n"
        f"with write_atomic({str(tmp_path / 'big.tar')!r}) as f:\n"
        "    f.write(b'x' * 100); f.flush(); print('ready', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.01)
    assert not (tmp_path / "big.tar").exists()
    assert len(list(tmp_path.iterdir())) == 1
    assert remove_leftovers(tmp_path, of="other.tar") == 0
    assert remove_leftovers(tmp_path, of="big.*") == 1
    assert not list(tmp_path.iterdir())
