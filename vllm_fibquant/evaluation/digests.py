# SPDX-License-Identifier: Apache-2.0
"""Digests of what decides a result: the model, and the code."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

from vllm_fibquant.files import PACKAGE_DIR

# What the numbers follow from: modules, and folders with all their modules. Kernels and adapters
# are left out: tests and the self-check at start hold them to the oracle.
_DECIDING = ("codec", "files.py", "options.py", "ops/reference.py", "evaluation/formats.py",
             "evaluation/rivals.py", "evaluation/simulate.py", "evaluation/measure.py")  # fmt: skip
_CALIBRATING = ("keys", "engine/calibrate.py", "engine/rotary.py")


@functools.cache
def code_digest(is_calibrated: bool) -> str:
    """Of the shipped codebooks, and of the modules that decide a row with a calibration or without.

    A module's statements count, each as a whole; its name, its place, imports, docstrings and the
    order of statements do not. So what moves from module to module leaves results current.
    """
    digest = hashlib.sha256()
    for statement in sorted(_statements(_DECIDING + (_CALIBRATING if is_calibrated else ()))):
        digest.update(statement.encode())
    for path in sorted((PACKAGE_DIR / "codebooks").glob("*.fqcb")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _statements(places: Iterable[str]) -> set[str]:
    """The top-level statements of modules, of all modules of folders, without imports and text."""
    found: set[str] = set()
    for place in places:
        path = PACKAGE_DIR / place
        for module in path.rglob("*.py") if path.is_dir() else (path,):
            tree = ast.parse(module.read_text())
            for node in ast.walk(tree):
                for name in ("body", "orelse", "finalbody"):
                    if isinstance(block := getattr(node, name, None), list):
                        setattr(node, name, [s for s in block if not _decides_nothing(s)])
            found.update(map(ast.dump, tree.body))
    return found


def _decides_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Import | ast.ImportFrom)


@functools.cache
def model_digest(folder: Path) -> str:
    """Of a model's configuration and weights."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while piece := file.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()[:16]
