# SPDX-License-Identifier: Apache-2.0
"""The user's cache: where it is looked for, and that nothing needs it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_fibquant import files

PACKAGE_ROOT = Path(files.__file__).parent.parent
NOBODY = 54321
"""A user that no passwd file knows, as containers have."""

needs_root = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None,
    reason="becomes another user: run as root, with setpriv",
)


@pytest.fixture
def homeless(monkeypatch):
    """The environment of a process that has been told of no folder."""
    for name in ("FIBQUANT_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "VLLM_CACHE_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: os.environ.get("HOME", path))
    files._say_absent.cache_clear()
    return monkeypatch


def test_candidates_in_order(homeless):
    assert files.cache_candidates() == []
    assert files.cache_dir() is None and files.find("a") is None and files.place("a") is None
    homeless.setenv("VLLM_CACHE_ROOT", "/v")
    homeless.setenv("HOME", "/h")
    homeless.setenv("XDG_CACHE_HOME", "/x")
    expected = ["/x/vllm-fibquant", "/h/.cache/vllm-fibquant", "/v/vllm-fibquant"]
    assert [str(path) for path in files.cache_candidates()] == expected
    homeless.setenv("XDG_CACHE_HOME", "relative")
    homeless.setenv("HOME", "")
    assert [str(path) for path in files.cache_candidates()] == expected[2:]
    homeless.setenv("FIBQUANT_CACHE_DIR", "/f")
    assert files.cache_candidates() == [Path("/f")], "a chosen folder is not replaced"


def test_reads_from_any_and_writes_to_the_first_that_can_be_written(homeless, tmp_path):
    homeless.setenv("XDG_CACHE_HOME", "/proc/none")  # cannot be made, by root neither
    homeless.setenv("HOME", str(tmp_path / "home"))
    homeless.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    files.write_atomically(tmp_path / "vllm/vllm-fibquant/a/old", b"1")
    assert files.find("a/old") == tmp_path / "vllm/vllm-fibquant/a/old"
    assert files.keep("a/new", b"2") == tmp_path / "home/.cache/vllm-fibquant/a/new"
    assert files.find("a/new").read_bytes() == b"2"
    assert files.find("a") is None, "a folder is no file"


def test_looking_creates_nothing(homeless, tmp_path):
    homeless.setenv("HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / ".cache" / "vllm-fibquant"
    assert files.is_writable(tmp_path / "a" / "b") and files.find("a") is None
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert not files.is_writable(tmp_path / "file")
    assert not files.is_writable(tmp_path / "file" / "below")
    assert not files.is_writable(tmp_path / ("x" * 300))


def test_absence_is_told_once(homeless, caplog):
    with caplog.at_level("WARNING", logger="vllm"):
        assert files.keep("a", b"") is None and files.keep("b", b"") is None
    assert [r.getMessage() for r in caplog.records] == [
        "FibQuant keeps nothing for the next start, as no cache can be written (there is no home "
        "directory); set FIBQUANT_CACHE_DIR to a folder that can"
    ]


def test_a_full_disk_is_told_and_stops_nothing(homeless, tmp_path, caplog):
    homeless.setenv("FIBQUANT_CACHE_DIR", str(tmp_path))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    homeless.setattr(files.os, "replace", full)
    with caplog.at_level("WARNING", logger="vllm"):
        assert files.keep("a", b"1") is None
    assert "No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == [], "no scratch file stays"


# ---- processes of a user without a name and without a home -------------------------------------


def as_nobody(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code as a user of no passwd entry, with no HOME but what is given."""
    # It may read everything, for the interpreter may be in another user's home, and write nothing.
    reads = "-all,+dac_read_search"
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    become += [f"--inh-caps={reads}", f"--ambient-caps={reads}"]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGE_ROOT), **environ}
    return subprocess.run(
        [*become, sys.executable, "-c", code], capture_output=True, text=True, cwd="/",
        env=environ, timeout=300,
    )  # fmt: skip


HOMES = pytest.mark.parametrize(
    "environ", [{}, {"HOME": "/"}, {"HOME": "/proc"}, {"HOME": "/none"}], ids=str
)


@needs_root
@HOMES
def test_info_needs_no_home(environ):
    code = "from vllm_fibquant.cli.main import main; raise SystemExit(main(['info', '--json']))"
    result = as_nobody(code, **environ)
    assert result.returncode == 0, result.stderr
    digests = json.loads(result.stdout)["codebooks"].values()
    assert len(digests) > 10 and all(len(digest) == 64 for digest in digests)


@needs_root
def test_a_missing_codebook_is_told_without_a_home():
    code = (
        "from vllm_fibquant.codec.codebook import load_codebook\n"
        "from vllm_fibquant.codec.config import CodeSpec\n"
        "load_codebook(CodeSpec(4, 32), 64)"
    )
    result = as_nobody(code)
    assert "must be shipped or built, got none in" in result.stderr
    assert "codebook build --head-dim 64" in result.stderr


@needs_root
def test_commands_that_write_say_so_before_they_work():
    code = (
        "from vllm_fibquant.cli.main import main\n"
        "main(['codebook', 'build', '--head-dim', '64', '--subvec-dim', '4', '--num-codewords',"
        " '32'])\n"
        "main(['calibrate', 'model'])"
    )
    result = as_nobody(code)
    assert "codebook build: --out must be a file that can be written, got no cache" in result.stderr
    assert "calibrate: --output must be a file that can be written, got no cache" in result.stderr
