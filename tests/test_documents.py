# SPDX-License-Identifier: Apache-2.0
"""What documents and the forge's files name exists: tests, targets of make, files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
TESTS: dict[str, str] = {}  # files of one name in several folders together
for path in (ROOT / "tests").rglob("test_*.py"):
    TESTS[path.stem] = TESTS.get(path.stem, "") + path.read_text()

FEATURES = (
    "prefix caching", "n-gram", "draft model", "EAGLE", "MTP", "Medusa", "LoRA", "sleep mode",
    "asynchronous scheduling", "structured output", "KV events", "KV connectors", "LMCache",
    "KV offloading", "batch invariance", "Model Runner V2", "decode context parallel",
    "prefill context parallel", "quantised weights", "fp8 cache",
)  # fmt: skip
"""Of vLLM, which the table of features answers for."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_targets_and_files_that_are_named_exist(document):
    text = document.read_text()
    for file, name in re.findall(r"\b(test_\w+)\.py(?:::(test_\w+))?", text):
        assert file in TESTS, file
        assert f"def {name}(" in TESTS[file] or not name, f"{file}.py::{name}"
    for path in re.findall(r"\]\(([^)#:]+)[)#]", text):
        assert (document.parent / path).exists(), path
    named = re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)
    assert set(named) <= TARGETS


def test_the_table_of_features_says_how_each_is_known():
    text = (ROOT / "docs" / "features.md").read_text().split("## Features of vLLM")[1]
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))
    for feature in FEATURES:
        assert any(feature in name for name in rows), feature
    for name, answer in rows.items():
        if name != "feature" and not name.startswith("---"):
            assert re.search(r"test_\w+\.py|refused|not tried", answer), name


def test_a_report_of_a_problem_asks_for_doctors_output():
    yaml = pytest.importorskip("yaml", reason="reads the forge's files")
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/problem.yml").read_text())
    (asked,) = [part for part in form["body"] if part.get("id") == "doctor"]
    assert "`vllm-fibquant doctor MODEL`" in asked["attributes"]["label"]
    assert asked["validations"]["required"] is True


def test_the_forge_runs_what_contributors_run():
    yaml = pytest.importorskip("yaml", reason="reads the forge's files")
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["make check", "make test"]
    assert {"check", "test", "wheel", "peers"} <= TARGETS
