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

# A module imports from its own layer and those below. A new module must be entered here.
LAYERS = {
    0: [
        "config",
        "codebook",
        "codebook_build",
        "source_law",
        "rotation",
        "codec",
        "options",
        "sealed",
        "key_transform",
        "list_search",
        "gain",
    ],
    1: ["layout", "key_map", "copies", "agreement", "counters", "calibration"],
    2: [
        "reference",
        "abi",
        "splits",
        "native",
        "native_cuda",
        "checks",
        "gpu",
        "ops",
        "selfcheck",
        "fidelity",
        "monitor",
        "loss",
    ],
    3: ["support", "metadata", "retention", "rotary", "attention", "report", "calibrate", "gate"],
    4: ["compat", "plugin"],
    5: [
        "__init__",
        "__main__",
        "calibrate_cli",
        "cli",
        "codebook_cli",
        "demo_model",
        "evaluation",
        "info",
        "launcher",
        "plan",
    ],
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}
# The codec of a preset knows the record it fills: the one import upwards, between two halves of
# the same description.
ALLOWED_UPWARD = {("codec", "layout")}

# Outside the adapters: the target of vLLM's console script, and users of its documented classes.
VLLM_ENTRY = {
    ("launcher", "vllm.entrypoints.cli"),
    ("calibrate_cli", "vllm"),
    ("evaluation", "vllm"),
    ("evaluation", "vllm.distributed"),
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


FILES = sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("evaluation/*.py")])


def module_of(path):
    """The module, or the package, that a layer is given to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path):
    return str(path.relative_to(PACKAGE).with_suffix(""))


def test_every_module_has_a_layer():
    assert sorted(LAYER_OF) == sorted({module_of(path) for path in FILES})


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_dependencies_point_down(path):
    module = module_of(path)
    for name, _ in imports_of(path):
        if not name.startswith("vllm_fibquant."):
            continue
        target = name.split(".")[1]
        if target not in LAYER_OF or (module, target) in ALLOWED_UPWARD:
            continue  # __version__ and the like
        assert LAYER_OF[target] <= LAYER_OF[module], f"{module} must not import {target}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_foreign_imports(path):
    """vLLM from layer 3 up; below, torch and numpy at import, scipy and tqdm when used."""
    module = module_of(path)
    for name, at_import in imports_of(path):
        root = name.split(".")[0]
        layer = LAYER_OF[module]
        if root == "vllm":
            assert layer >= 3, f"{module} must import without vLLM, imports {name}"
            if layer == 5:
                assert (module, name) in VLLM_ENTRY, f"{module}: vLLM is touched in compat alone"
        elif root in sys.stdlib_module_names or root == "vllm_fibquant":
            continue
        elif layer <= 2 and at_import:
            assert root in ("torch", "numpy"), f"{module} must not need {root} to be imported"
        elif layer == 5:
            is_late = module in ("codebook_cli", "evaluation")  # imported by their command alone
            assert not at_import or is_late, f"{module} must import {root} lazily"


def test_lower_layers_import_without_vllm():
    modules = [m for layer in range(3) for m in LAYERS[layer]]
    code = (
        "import sys, importlib\n"
        "sys.modules['vllm'] = sys.modules['scipy'] = sys.modules['transformers'] = None\n"
        f"for m in {modules}: importlib.import_module('vllm_fibquant.' + m)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): count
        for path in tracked(*SOURCES)
        if (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long, f"files must have at most {MAX_LINES} lines; split by idea"


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
            is_vllms = name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_PLUGINS")
            assert name.startswith("FIBQUANT_") or is_vllms, path.name


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
