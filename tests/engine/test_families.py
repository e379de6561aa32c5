# SPDX-License-Identifier: Apache-2.0
"""README's table of models names what the tests serve and refuse."""

from __future__ import annotations

import importlib

from .families import BEGIN, END, LATENT_TEST, README, REFUSED, TEST, missing, table

NEEDS_ENGINE = False


def test_readme_names_every_architecture_that_is_tested():
    told = README.read_text().split(BEGIN)[1].split(END)[0].strip()
    assert told == table(), "run: python -m tests.engine.families"
    assert missing() == set()


def test_the_tests_it_names_exist():
    for test in (TEST, LATENT_TEST, *(test for _, test in REFUSED.values())):
        file, name = test.split(".py::")
        assert hasattr(importlib.import_module(f"tests.engine.{file}"), name), test
