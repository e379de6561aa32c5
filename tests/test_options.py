# SPDX-License-Identifier: Apache-2.0
"""Options given as additional_config["fibquant"]."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.options import (
    MonitorOptions,
    Options,
    Retain,
    misplaced_options,
    parse_options,
)


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, "text", {"fibquant": {}}])
def test_without_options_a_preset_has_its_defaults(additional):
    assert parse_options("fibquant_2bit", additional) == Options(PRESETS["fibquant_2bit"])


def test_options_are_applied():
    given = {"prefill": "raw", "self_check": False, "value": {"num_codewords": 1024}}
    options = parse_options("fibquant_2bit", {"fibquant": given})
    assert (options.prefill, options.self_check) == ("raw", False)
    assert options.preset.value.num_codewords == 1024
    assert options.preset.key == PRESETS["fibquant_2bit"].key
    assert options.digest != Options(PRESETS["fibquant_2bit"]).digest


def test_every_problem_is_named_at_once():
    given = {"prefil": "raw", "prefill": "both", "self_check": 1, "key": {"subvec": 2}}
    with pytest.raises(ValueError, match="fibquant options") as caught:
        parse_options("fibquant", {"fibquant": given})
    message = str(caught.value)
    for part in ("'prefil'", "'both'", "got 1", "'subvec'", "rotation_seed", "num_codewords"):
        assert part in message


def test_a_bad_code_is_refused_with_its_reason():
    with pytest.raises(ValueError, match="num_codewords must be a power of two"):
        parse_options("fibquant", {"fibquant": {"key": {"num_codewords": 100}}})


def test_the_section_must_be_an_object():
    with pytest.raises(ValueError, match="must be an object, got 'raw'"):
        parse_options("fibquant", {"fibquant": "raw"})


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match="fibquant_2bit.*got 'fibquant_5bit'"):
        parse_options("fibquant_5bit")


def test_modes_and_what_overrides_them() -> None:
    def parsed(**given):
        options = parse_options("fibquant", {"fibquant": given})
        return options.prefill, options.recent_window, options.num_copies

    assert parsed() == parsed(mode="quality") == ("raw", 128, 132)
    assert parsed(mode="exact") == ("codes", 0, 0)
    assert parsed(mode="quality", prefill="codes") == ("codes", 0, 0)
    assert parsed(mode="quality", recent_window=32, first_tokens=1) == ("raw", 32, 33)
    assert parsed(mode="exact", prefill="raw") == ("raw", 0, 0)
    assert parsed(prefill="codes") == ("codes", 0, 0)
    assert parsed(recent_window=0) == ("raw", 0, 0)


def test_defaults_are_what_a_run_can_have() -> None:
    def parsed(*lacking, **given):
        options = parse_options("fibquant", {"fibquant": given}, lacking)
        return options.prefill, options.recent_window, options.calibrate

    assert parsed() == ("raw", 128, "auto")
    assert parsed("copies") == ("codes", 0, "auto")
    assert parsed("calibration") == ("raw", 128, "none")
    assert parsed(retain={"recent": 64}) == ("codes", 0, "none")
    # What is asked for by name stays, to be given or refused.
    assert parsed("copies", mode="quality") == ("raw", 128, "auto")
    assert parsed("copies", "calibration", calibrate="means") == ("codes", 0, "means")
    assert parsed("calibration", calibration="a.fqcal") == ("raw", 128, "auto")


@pytest.mark.parametrize(
    ("preset", "given", "expected"),
    [
        ("fibquant", {}, True),
        ("fibquant_1bit", {}, True),
        ("fibquant_4bit", {}, True),
        ("fibquant_4bit", {"calibrate": "means"}, False),
        ("fibquant_k5v3", {}, False),
        ("fibquant", {"calibrate": "means"}, False),
        ("fibquant", {"calibrate": "none"}, False),
    ],
)
def test_keys_are_transformed_where_it_helps(preset, given, expected):
    assert parse_options(preset, {"fibquant": given}).transforms_keys == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "best"}, "mode must be"),
        ({"recent_window": 64, "mode": "exact"}, "recent_window must be 0 when prefill"),
        ({"recent_window": -1, "prefill": "raw"}, "recent_window must be an integer"),
        ({"recent_window": True, "mode": "quality"}, "recent_window must be an integer"),
        ({"first_tokens": 65}, "first_tokens must be an integer from 0 to 64"),
    ],
)
def test_bad_windows_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_options("fibquant", {"fibquant": given})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"recent": 1024}, Retain(1024, 4)),
        ({"first": 0, "recent": 1}, Retain(1, 0)),
        (None, None),
    ],
)
def test_what_to_keep(given, expected):
    options = parse_options("fibquant", {"fibquant": {"retain": given}})
    assert options.retain == expected
    assert (options.digest == parse_options("fibquant").digest) == (expected is None)


@pytest.mark.parametrize(
    "given",
    [1024, {}, {"first": 4}, {"recent": 0}, {"recent": True}, {"recent": 1.5},
     {"recent": 8, "first": -1}, {"recent": 8, "last": 2}],
)  # fmt: skip
def test_a_bad_bound_is_refused(given):
    with pytest.raises(ValueError, match="retain must be an object") as caught:
        parse_options("fibquant", {"fibquant": {"retain": given}})
    assert f"got {given!r}" in str(caught.value)


def test_a_bound_needs_codes():
    with pytest.raises(ValueError, match='prefill must be "codes" with retain'):
        parse_options("fibquant", {"fibquant": {"retain": {"recent": 8}, "prefill": "raw"}})


def test_calibration() -> None:
    def parsed(**given):
        return parse_options("fibquant", {"fibquant": given})

    assert parsed().calibrate == "auto"
    options = parsed(calibrate="means", calibration="a.fqcal")
    assert (options.calibrate, options.calibration) == ("means", "a.fqcal")
    assert len({options.digest, parsed().digest, parsed(calibrate="means").digest}) == 3
    for bad, message in (
        ({"calibrate": "mean"}, 'must be "auto" or "transform" or "means" or "none".*got \'mean\''),
        ({"calibrate": "none", "calibration": "a.fqcal"}, 'given with "calibrate"'),
        ({"calibrate": "means", "calibration": 3}, "must be the path of a file"),
        ({"calibration": ""}, "must be the path of a file"),
        ({"calibrate": "means", "retain": {"recent": 64}}, 'calibrate must be "none" with retain'),
    ):
        with pytest.raises(ValueError, match=message):
            parsed(**bad)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (False, None),
        (None, None),
        (True, MonitorOptions(0.005, 4096)),
        ({}, MonitorOptions(0.005, 4096)),
        ({"budget": 0.1, "tokens": 64}, MonitorOptions(0.1, 64)),
    ],
)
def test_the_monitor(given, expected):
    assert parse_options("fibquant", {"fibquant": {"monitor": given}}).monitor == expected


@pytest.mark.parametrize(
    "given",
    [1, "on", [], {"budget": 0}, {"budget": 0.2}, {"budget": True}, {"tokens": 63}, {"rate": 1}],
)
def test_a_bad_monitor_is_refused(given):
    with pytest.raises(ValueError, match="monitor must be true, false or an object") as caught:
        parse_options("fibquant", {"fibquant": {"monitor": given}})
    assert repr(given) in str(caught.value)


def test_layers() -> None:
    options = parse_options(
        "fibquant_2bit",
        {"fibquant": {"layers": {"29, 0-1": "fibquant", "3": "fibquant_4bit"}, "rotation_seed": 5,
                      "value": {"num_codewords": 1024}}},
    )  # fmt: skip
    assert options.layers == (
        (0, "fibquant"), (1, "fibquant"), (3, "fibquant_4bit"), (29, "fibquant"),
    )  # fmt: skip
    assert options.for_layer("fibquant_2bit") is options
    of_layer = options.for_layer("fibquant")
    # What is overridden is the preset of --kv-cache-dtype; the rotation is that of all.
    assert of_layer.preset == replace(PRESETS["fibquant"], rotation_seed=5)
    assert options.preset.value.num_codewords == 1024
    assert [p.name for p in options.presets] == ["fibquant_2bit", "fibquant", "fibquant_4bit"]
    plain = parse_options("fibquant_2bit")
    assert plain.presets == (PRESETS["fibquant_2bit"],)
    spelt = parse_options("fibquant_2bit", {"fibquant": {"layers": {"0,1": "fibquant"}}})
    same = parse_options("fibquant_2bit", {"fibquant": {"layers": {"0-1": "fibquant"}}})
    assert spelt.digest == same.digest != plain.digest


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0-1", "layers must be an object of layers and presets, got '0-1'"),
        ({"0": "auto"}, "presets among fibquant_4bit, .*, got 'auto'"),
        ({"0": {"key": {}}}, "presets among .*, got {'key'"),
        ({"0": ["fibquant"]}, "presets among .*, got .'fibquant'"),
        ({"": "fibquant"}, "numbers and ranges such as 0-1,29, got ''"),
        ({"0,": "fibquant"}, "numbers and ranges such as 0-1,29, got '0,'"),
        ({"-1": "fibquant"}, "numbers and ranges such as 0-1,29, got '-1'"),
        ({"2-1": "fibquant"}, "numbers and ranges such as 0-1,29, got '2-1'"),
        ({"first": "fibquant"}, "numbers and ranges such as 0-1,29, got 'first'"),
        ({"0-99999999": "fibquant"}, "numbers and ranges such as 0-1,29, got '0-99999999'"),
        ({"0-3": "fibquant", "3": "fibquant_4bit"}, "name each layer once, got layer 3 twice"),
        ({"1,0-2": "fibquant"}, "name each layer once, got layer 1 twice"),
        ({"0": "fibquant_2bit"}, "another preset than --kv-cache-dtype, got fibquant_2bit"),
    ],
)
def test_bad_layers_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parse_options("fibquant_2bit", {"fibquant": {"layers": given}})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"mode": "quality"},
            'got mode in its place, which is not read; give {"fibquant": {"mode"',
        ),
        ({"FibQuant": {"mode": "quality"}}, "got FibQuant in its place"),
        ({"fib_quant": {"calibrate": "none"}}, 'give {"fibquant": {"calibrate": "none"}}'),
        ({"vllm-fibquant": {}}, "got vllm-fibquant in its place"),
    ],
)
def test_misplaced_options_are_told(given, told):
    assert told in misplaced_options(given)


@pytest.mark.parametrize(
    "given", [None, {}, {"fibquant": {"mode": "exact"}, "mode": 1}, {"other": {"mode": 1}}]
)
def test_options_of_others_are_left_alone(given):
    assert misplaced_options(given) is None
