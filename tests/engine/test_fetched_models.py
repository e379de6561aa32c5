# SPDX-License-Identifier: Apache-2.0
"""Real models, where a folder of them is given: what is served by default, and the simulation.

FIBQUANT_TEST_MODELS names a folder with a folder for each model (CONTRIBUTING.md).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODELS = ("gemma-3-270m", "Qwen2.5-Coder-0.5B-Instruct", "Qwen2.5-Coder-1.5B-Instruct")
LENGTH = 512


def fetched(name: str) -> Path:
    """The folder of a model that the tests were given, or a skip that says what is missing."""
    folder = os.environ.get("FIBQUANT_TEST_MODELS")
    if not folder or not (Path(folder) / name / "config.json").is_file():
        pytest.skip(f"FIBQUANT_TEST_MODELS names no folder that holds {name}")
    return Path(folder) / name


@pytest.mark.parametrize("name", MODELS)
def test_the_default_is_faithful(name):
    """Prose and code through the engine: close to the uncompressed model's distributions."""
    from vllm_fibquant.evaluation.trial import measure_rows, parse_row

    rows = [parse_row("auto"), parse_row("fibquant")]
    results = measure_rows(str(fetched(name)), rows, ["prose", "code"], LENGTH, 1)
    assert len(results) == 4
    for result in results[:2]:
        assert result["kl"] < 1e-6, "the uncompressed cache is the truth"
    for result in results[2:]:
        assert result["kl"] < 0.012
        assert abs(result["loss_increase"]) < 0.02
        assert result["same"] > 0.93


@pytest.mark.parametrize("name", MODELS[:2])
def test_the_simulation_is_the_model(name):
    """Plain PyTorch gives what vLLM gives, sliding windows and both rotary bases included."""
    from vllm_fibquant.evaluation.engine import UNCOMPRESSED, Engine
    from vllm_fibquant.evaluation.measure import measure_text
    from vllm_fibquant.evaluation.simulate import Simulator
    from vllm_fibquant.evaluation.texts import Tokenizer, text_units

    folder = str(fetched(name))
    (unit,) = text_units(Tokenizer(folder), ["prose"], 768, 1)  # longer than Gemma's windows
    engine = Engine(folder, UNCOMPRESSED, {}, 256, len(unit.tokens))
    try:
        (truth,) = engine.hidden([unit.tokens])
    finally:
        engine.close()
    simulator = Simulator(folder)
    states = simulator.hidden(list(unit.tokens))
    metrics = measure_text(simulator.logits, unit.tokens, truth, states, 600)
    assert metrics["kl"] < 1e-6 and metrics["far_kl"] < 1e-6
