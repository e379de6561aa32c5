# SPDX-License-Identifier: Apache-2.0
"""The shape of the code base: layers, file sizes, licence lines, and what it must not mention."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vllm_fibquant"

# A module imports from its own folder and those before it in CONTRIBUTING's table. A module outside
# folders belongs to the last folder that it imports from. `kernels` and `server` are links.
FOLDERS = re.findall(r"^\| `(\w+)/`", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
# The launchers of the Triton kernels choose splits as those of the CUDA kernels do.
ALLOWED_UPWARD = {("kernels", "vllm_fibquant.ops")}

# Outside engine/: the target of vLLM's console script, and users of its documented classes.
VLLM_ENTRY = {
    ("cli", "vllm.entrypoints.cli"),
    ("cli", "vllm.entrypoints.launchers.cli_args"),
    ("cli", "vllm.engine.arg_utils"),
    ("cli", "vllm.utils.argparse_utils"),
    ("cli", "vllm"),
    ("evaluation", "vllm"),
    ("evaluation", "vllm.distributed"),
    ("evaluation", "vllm.model_executor.layers.attention"),
}

MAX_LINES = 440  # "about 400"
SOURCES = ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")


def tracked(*patterns):
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout: the list of files is not known")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def imports_of(path):
    """(imported module, is it imported when the module is)."""
    tree = ast.parse(path.read_text())
    lazy = set()
    for node in ast.walk(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if is_function or is_typing:
            lazy.update(id(inner) for inner in ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports must be absolute"
            if node.module == "vllm_fibquant":
                names = [f"vllm_fibquant.{alias.name}" for alias in node.names]
            else:
                names = [node.module]
            yield from ((name, id(node) not in lazy) for name in names)


FILES = sorted([*PACKAGE.glob("*.py"), *(f for d in FOLDERS for f in (PACKAGE / d).glob("*.py"))])


def folder_of(path):
    """The folder of a file of the package, or None."""
    return parts[0] if len(parts := path.relative_to(PACKAGE).parts) > 1 else None


def name_of(path):
    return str(path.relative_to(PACKAGE).with_suffix(""))


def rank(module):
    """A module's or package's place among FOLDERS; of one outside folders, that of its imports."""
    name = module.split(".")[1]
    if name in FOLDERS:
        return FOLDERS.index(name)
    path = PACKAGE / f"{name}.py"
    inner = (
        [n for n, _ in imports_of(path) if n.startswith("vllm_fibquant.")] if path.exists() else []
    )
    return max(map(rank, inner), default=-1)


def test_every_folder_has_a_place():
    found = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert found == set(FOLDERS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_dependencies_point_down(path):
    folder = folder_of(path)
    for name, _ in imports_of(path):
        is_allowed = any(folder == low and name.startswith(up) for low, up in ALLOWED_UPWARD)
        if folder and name.startswith("vllm_fibquant.") and not is_allowed:
            assert rank(name) <= FOLDERS.index(folder), f"{folder} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_foreign_imports(path):
    """vLLM from engine/ on; before it, torch and numpy at import, scipy and tqdm when used."""
    folder = folder_of(path)
    is_low = folder and FOLDERS.index(folder) < FOLDERS.index("engine")
    for name, at_import in imports_of(path):
        root = name.split(".")[0]
        if root in sys.stdlib_module_names or root == "vllm_fibquant":
            continue
        if root == "vllm":
            is_entry = (folder, name) in VLLM_ENTRY
            assert folder == "engine" or is_entry, f"{name_of(path)} must not import {name}"
        elif is_low and at_import:
            known = ("torch", "numpy", *(["triton"] if folder == "kernels" else []))
            assert root in known, f"{name_of(path)} must not need {root} to be imported"
        elif folder in (None, "cli"):
            is_late = name_of(path) == "cli/codebook"  # imported by its command alone
            assert not at_import or is_late, f"{name_of(path)} must import {root} lazily"


def test_lower_folders_import_without_vllm():
    low = [d for d in FOLDERS[: FOLDERS.index("engine")] if d != "kernels"]
    names = [
        n for path in FILES if folder_of(path) in low and not (n := name_of(path)).endswith("_")
    ]
    code = (
        "import sys, importlib\n"
        "sys.modules['vllm'] = sys.modules['scipy'] = sys.modules['transformers'] = None\n"
        f"for m in {[n.replace('/', '.') for n in names]}:\n"
        "    importlib.import_module('vllm_fibquant.' + m)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("folder", [d for d in FOLDERS if d != "ops"])
def test_folders_do_nothing_when_imported(folder):
    """--help imports no torch. The package ops is the door to the operations, and imports them."""
    path = PACKAGE / folder / "__init__.py"
    assert folder == "evaluation" or not path.exists() or not path.read_text()


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): count
        for path in tracked(*SOURCES)
        if (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long, f"files must have at most {MAX_LINES} lines; split by idea"


def test_a_keys_way_is_short():
    """CONTRIBUTING lists what to read to have seen it all; no function there fills two screens."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.split("### One key's way")[1].split("\n## ")[0]
    first = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    paths = [
        (ROOT if name.startswith("csrc") else PACKAGE) / name
        for name in re.findall(r"`([^`]+)`", first)
    ]
    assert 10 < len(paths) <= 14
    assert sum(len(path.read_text().splitlines()) for path in paths) <= 2200
    for path in paths:
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    assert node.end_lineno - node.lineno < 80, f"{path.name}: {node.name}"


def test_sources_name_their_licence():
    missing = [
        str(path.relative_to(ROOT))
        for path in tracked(*SOURCES)
        if (text := path.read_text()) and "SPDX-License-Identifier: Apache-2.0" not in text[:200]
    ]
    assert not missing


def test_no_asserts_on_what_users_give():
    """An assert vanishes under -O and prints no value: the package raises instead."""
    found = [
        f"{path.name}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert not found


def test_environment_names():
    """Our own environment variables begin with FIBQUANT_; the others are vLLM's."""
    pattern = re.compile(r"""(?:environ(?:\.get)?|getenv)\s*[\[(]\s*["']([A-Z_]+)""")
    for path in FILES:
        for name in pattern.findall(path.read_text()):
            is_vllms = name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_PLUGINS", "VLLM_CACHE_ROOT")
            is_common = name == "XDG_CACHE_HOME"
            assert name.startswith("FIBQUANT_") or is_vllms or is_common, path.name


def test_speaks_of_itself_alone():
    """No directories of a developer's machine, and no numbers of a tracker only some can read."""
    pattern = re.compile(
        r"/(?:home|root|Users|opt|work)/\w|\b(?:issue|ticket|session|task) #?\d+\b", re.IGNORECASE
    )
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in tracked()
        if path.suffix not in (".fqcb", ".png")
        and (match := pattern.search(path.read_text(errors="replace")))
    ]
    assert not found


def test_every_link_in_the_documents_exists():
    for document in tracked("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
