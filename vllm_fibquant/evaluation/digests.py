# SPDX-License-Identifier: Apache-2.0
"""Digests of what decides a result: the model, and the code."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

from vllm_fibquant.files import PACKAGE_DIR

# Where numbers are computed, and where a map of keys is made: modules, and folders with all their
# modules. What these import from evaluation/ or from beside the folders decides as well. Kernels
# and adapters do not: tests and the self-check at start hold them to the oracle.
_MEASURING = ("codec", "evaluation/measure.py", "evaluation/rivals.py", "ops/reference.py")
_CALIBRATING = ("keys", "engine/calibrate.py", "engine/rotary.py")


@functools.cache
def code_digest(is_calibrated: bool) -> str:
    """Of the shipped codebooks, and of the modules that decide a row with a calibration or without.

    A module's statements count, each as a whole; its name, its place, imports, docstrings and the
    order of statements do not. So what moves from module to module leaves results current.
    """
    digest = hashlib.sha256()
    for statement in sorted(_statements(_MEASURING + (_CALIBRATING if is_calibrated else ()))):
        digest.update(statement.encode())
    for path in sorted((PACKAGE_DIR / "codebooks").glob("*.fqcb")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _statements(places: Iterable[str]) -> set[str]:
    """The top-level statements of modules, of all modules of folders, and of what they import that
    decides as well; without imports and text."""
    found: set[str] = set()
    paths = [PACKAGE_DIR / place for place in places]
    todo = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else (path,))]
    seen = set(todo)
    while todo:
        tree = ast.parse(todo.pop().read_text())
        for node in ast.walk(tree):
            for name in ("body", "orelse", "finalbody"):
                if isinstance(block := getattr(node, name, None), list):
                    imports = () if _is_for_types(node) else map(_deciding_import, block)
                    todo += {path for path in imports if path} - seen
                    seen.update(todo)
                    setattr(node, name, [s for s in block if not _decides_nothing(s)])
        found.update(map(ast.dump, tree.body))
    return found


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _deciding_import(statement: ast.stmt) -> Path | None:
    """The file that `from vllm_fibquant.MODULE import ...` reads, of evaluation/ or outside
    folders."""
    if not isinstance(statement, ast.ImportFrom) or not statement.module:
        return None
    package, *names = statement.module.split(".")
    path = PACKAGE_DIR.joinpath(*names).with_suffix(".py")
    is_near = len(names) == 1 or names[:1] == ["evaluation"]
    return path if package == "vllm_fibquant" and is_near and path.exists() else None


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
