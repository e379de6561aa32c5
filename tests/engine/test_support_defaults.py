# SPDX-License-Identifier: Apache-2.0
"""What a run gets by default, and what it is told when a part of that cannot be had."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

support = pytest.importorskip("vllm_fibquant.engine.support", reason="reads vLLM's configuration")


def run(
    device="cpu",
    connector=None,
    offloading=None,
    is_hybrid=False,
    draft=None,
    use_ubatching=False,
    **given,
):
    """As much of vLLM's configuration as decides the defaults."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            is_hybrid=is_hybrid, architecture="A", use_mla=False, get_head_size=lambda: 64
        ),
        device_config=SimpleNamespace(device_type=device),
        cache_config=SimpleNamespace(cache_dtype="fibquant", kv_offloading_size=offloading),
        kv_transfer_config=connector,
        parallel_config=SimpleNamespace(use_ubatching=use_ubatching),
        speculative_config=draft and SimpleNamespace(method=draft),
        additional_config={"fibquant": given},
    )


def mode_of(config) -> tuple:
    options = support.run_options(config)
    return options.prefill, options.recent_window, options.calibrate


@pytest.mark.parametrize(
    ("settings", "expected", "told"),
    [
        ({}, ("raw", 128, "auto"), []),
        ({"device": "cuda"}, ("codes", 0, "none"), ["copies", "calibration"]),
        ({"connector": "any"}, ("codes", 0, "none"), ["copies", "calibration"]),
        ({"offloading": 1.0}, ("codes", 0, "none"), ["copies", "calibration"]),
        ({"is_hybrid": True}, ("raw", 128, "none"), ["calibration"]),
        ({"retain": {"recent": 64}}, ("codes", 0, "none"), ["copies", "calibration"]),
    ],
    ids=str,
)
def test_a_default_is_the_best_that_can_be_had(settings, expected, told):
    config = run(**settings)
    assert mode_of(config) == expected
    assert list(support.lacking_parts(config)) == told
    assert len(support.told_defaults(config)) == len(told)


def test_a_gpu_with_the_cuda_library_has_the_defaults_of_a_cpu(monkeypatch):
    monkeypatch.setattr(support.gpu, "why_no_maps", lambda head_dim: None)
    for settings in ({}, {"draft": "ngram"}):
        assert mode_of(run("cuda", **settings)) == ("raw", 128, "auto")
        assert support.told_defaults(run("cuda", **settings)) == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"draft": "eagle"}, "draft model (eagle)"), ({"use_ubatching": True}, "microbatches")],
    ids=str,
)
def test_copies_of_a_gpu_need_steps_one_after_the_other(monkeypatch, settings, reason):
    monkeypatch.setattr(support.gpu, "why_no_maps", lambda head_dim: None)
    assert mode_of(run("cuda", **settings)) == ("codes", 0, "auto")
    (told,) = support.told_defaults(run("cuda", **settings))
    assert 'mode is "exact"' in told and reason in told
    assert mode_of(run("cpu", **settings)) == ("raw", 128, "auto")


def test_what_is_asked_for_by_name_is_not_replaced_nor_told():
    config = run("cuda", mode="quality", calibrate="means")
    assert mode_of(config) == ("raw", 128, "means")
    assert support.told_defaults(config) == []
    (told,) = support.told_defaults(run("cuda", mode="exact"))
    assert "keys are not calibrated: the CUDA library is not built" in told


def test_a_shared_file_calibrates_pages_that_move(tmp_path):
    path = tmp_path / "a.fqcal"
    path.touch()
    config = run(connector=object(), calibrate="means", calibration=str(path))
    assert support.calibrate_problems(config, support.run_options(config)) == []
    config = run(connector=object(), calibration=str(path))
    assert support.run_options(config).calibrate == "means"
    assert support.calibrate_problems(config, support.run_options(config)) == []
    config = run(connector=object(), calibrate="transform", calibration=str(path))
    (problem,) = support.calibrate_problems(config, support.run_options(config))
    assert 'it must be "means" with KV connectors' in problem
