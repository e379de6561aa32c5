# SPDX-License-Identifier: Apache-2.0
"""Digests of what decides a result: the model, and the code."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
# What the numbers follow from, wherever a module lies. Kernels and adapters are not here: tests and
# the self-check at start hold them to the oracle.
_DECIDING = ("config", "codebook", "codec", "list_search", "rotation", "layout", "gain", "options",
             "reference", "formats", "rivals", "simulate", "measure")  # fmt: skip
_CALIBRATING = ("key_map", "key_transform", "calibration", "calibrate", "rotary")


@functools.cache
def code_digest(is_calibrated: bool) -> str:
    """Of the shipped codebooks and the statements, without docstrings and imports, of the modules
    that decide a row with a calibration or without."""
    digest = hashlib.sha256()
    names = _DECIDING + (_CALIBRATING if is_calibrated else ())
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda path: path.name):
        if path.stem in names and "kernels" not in path.parts:
            digest.update(statements(path.read_text()).encode())
    for path in sorted((PACKAGE / "codebooks").glob("*.fqcb")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def statements(source: str) -> str:
    """What a module does, without what moving it or explaining it would change."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not _is_aside(s)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_aside(statement: ast.stmt) -> bool:
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_text or isinstance(statement, ast.Import | ast.ImportFrom)


@functools.cache
def model_digest(folder: Path) -> str:
    """Of a model's configuration and weights."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while piece := file.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()[:16]
