# SPDX-License-Identifier: Apache-2.0
"""What a user can ask for: a preset's name and the object given as additional_config["fibquant"].

    vllm serve MODEL --kv-cache-dtype fibquant_2bit \\
        --additional-config '{"fibquant": {"mode": "quality", "recent_window": 256}}'

    name            value                            meaning
    mode            "quality" (default), "exact"     defaults of the next two, see docs/engine.md
    prefill         "codes" or "raw"                 what a step's own new tokens are read from
    recent_window   integer from 0 to 4096           newest tokens of a request also kept in 16 bits
    first_tokens    integer from 0 to 64             first tokens also kept in 16 bits, with a
                                                     recent_window
    key, value      object with fields of CodeSpec   replaces parts of the preset's code
    layers          {"0-1,29": "fibquant_k5v3"}      other presets for some layers, by number
    rotation_seed   integer of at least 0            seed of the rotation
    self_check      true (default) or false          compare kernel and oracle at start
    fidelity_gate   true (default) or false          measure at start what codes cost the model
    accept_loss     true or false (default)          serve even if that is very much
    unproven_gpu    true or false (default)          serve on a GPU, where no kernel has run yet
    triton          true or false (default)          serve on a GPU also what its CUDA library has
                                                     not, by slower kernels
    retain          {"first": 4, "recent": 1024}     keep a request's first and newest tokens alone;
                                                     "first" may be left out; default: keep all
    monitor         true, false (default), or        compare, while serving, attention over codes
                    {"budget": 0.005,                with attention over exact keys and values; in
                     "tokens": 4096}                 at most this share of step time, keeping at
                                                     most this many exact tokens (monitor.py)
    calibrate       "auto" (default), "transform",   what a measurement of the model's keys is
                    "means" or "none"                used for, see docs/calibration.md
    calibration     path of a file                   where that is kept; default: in the cache

A default is what this run can have: `parse_options` is told what it cannot, and what a user asks
for by name is given or refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from vllm_fibquant.codec.config import PRESETS, PrefillMode, Preset, get_preset, is_fibquant

SECTION = "fibquant"
Mode = Literal["exact", "quality"]
Calibrate = Literal["auto", "transform", "means", "none"]
DEFAULT_MODE: Mode = "quality"
DEFAULT_CALIBRATE: Calibrate = "auto"

Part = Literal["copies", "calibration"]
"""What the defaults are made of that some runs cannot have: tokens kept in 16 bits as well (mode
"quality"), and a measurement of the model's keys."""

MAX_AUTO_TRANSFORM_RATE = 4.0
"""Bits per coordinate of keys up to which "auto" transforms them, and up to which keys can be."""
MAX_RECENT_WINDOW = 4096
MAX_FIRST_TOKENS = 64
MAX_MONITOR_BUDGET = 0.1

QUALITY_WINDOW = 128
# prefill, recent_window
_MODES: dict[Mode, tuple[PrefillMode, int]] = {
    "exact": ("codes", 0),
    "quality": ("raw", QUALITY_WINDOW),
}
DEFAULT_FIRST = 4
"""First tokens of a request that are treated apart, as many as StreamingLLM (arXiv 2309.17453,
section 3.2) keeps."""


@dataclass(frozen=True)
class Retain:
    """Which tokens of a request stay cached: its first, and its newest."""

    recent: int
    first: int = DEFAULT_FIRST

    @property
    def total(self) -> int:
        return self.first + self.recent


@dataclass(frozen=True)
class MonitorOptions:
    """What the fidelity monitor may take.

    Attributes:
        budget: share of step time.
        tokens: tokens whose exact keys and values are kept, of one layer and KV head each.
    """

    budget: float = 0.005
    tokens: int = 4096


@dataclass(frozen=True)
class Options:
    """Everything that decides what is stored and how it is read; hashable and comparable.

    Attributes:
        preset: of --kv-cache-dtype; in the options of one layer, that layer's.
        layers: numbers of the layers that have another preset, and its name, in order.
    """

    preset: Preset
    prefill: PrefillMode = _MODES[DEFAULT_MODE][0]
    recent_window: int = _MODES[DEFAULT_MODE][1]
    first_tokens: int = DEFAULT_FIRST
    self_check: bool = True
    retain: Retain | None = None
    unproven_gpu: bool = False
    triton: bool = False
    monitor: MonitorOptions | None = None
    calibrate: Calibrate = DEFAULT_CALIBRATE
    calibration: str | None = None
    layers: tuple[tuple[int, str], ...] = ()
    fidelity_gate: bool = True
    accept_loss: bool = False

    def for_layer(self, preset_name: str) -> Options:
        """The options of a layer with this preset."""
        if preset_name == self.preset.name:
            return self
        preset = replace(get_preset(preset_name), rotation_seed=self.preset.rotation_seed)
        return replace(self, preset=preset)

    @property
    def transforms_keys(self) -> bool:
        """Whether keys are transformed, once they have been measured."""
        if self.calibrate == "auto":
            return self.preset.key.rate <= MAX_AUTO_TRANSFORM_RATE
        return self.calibrate == "transform"

    @property
    def presets(self) -> tuple[Preset, ...]:
        """The preset of --kv-cache-dtype, and those of layers that have another."""
        names = dict.fromkeys([self.preset.name, *(name for _, name in self.layers)])
        return tuple(self.for_layer(name).preset for name in names)

    @property
    def num_copied_first(self) -> int:
        """First tokens of a request that are also kept in 16 bits."""
        return self.first_tokens if self.recent_window else 0

    @property
    def num_copies(self) -> int:
        """Tokens of a request that are also kept in 16 bits, at most."""
        return self.num_copied_first + self.recent_window

    @property
    def digest(self) -> str:
        """Short hexadecimal digest, the same in every process."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:8]


_PRESET_NAMES = ("key", "value", "rotation_seed")
_NAMES = ("mode", *(f.name for f in fields(Options) if f.name != "preset"), *_PRESET_NAMES)
_SWITCHES = tuple(f.name for f in fields(Options) if f.type == "bool")
_LARGEST = {"recent_window": MAX_RECENT_WINDOW, "first_tokens": MAX_FIRST_TOKENS}


def given_options(additional_config: Any) -> Any:
    """What a user gave under "fibquant", which need not be valid; an empty object for nothing."""
    given = additional_config.get(SECTION) if isinstance(additional_config, dict) else None
    return {} if given is None else given


def misplaced_options(additional_config: Any) -> str | None:
    """What to say of options that are one level too high, or under a misspelt name.

    Other plugins and platforms read the same object: where ours is in its place, names beside it
    are theirs.
    """
    if not isinstance(additional_config, dict) or SECTION in additional_config:
        return None
    found = {name: x for name, x in additional_config.items() if name in _NAMES}
    for name, inner in additional_config.items():
        if re.sub(r"[^a-z]", "", str(name).lower()) in (SECTION, f"vllm{SECTION}"):
            found = inner if isinstance(inner, dict) else {}
            break
    else:
        if not found:
            return None
        name = ", ".join(found)
    example = json.dumps({SECTION: found}, default=str)
    return (
        f'--additional-config: FibQuant\'s options must be under "{SECTION}", got {name} in its '
        f"place, which is not read; give {example}"
    )


def parse_options(
    preset_name: str, additional_config: Any = None, lacking: Collection[Part] = ()
) -> Options:
    """The options of a run.

    Args:
        preset_name: the --kv-cache-dtype value.
        additional_config: vLLM's --additional-config, of which only the part under "fibquant"
            is read; None or anything without that part means defaults.
        lacking: what this run cannot have; defaults go without it. It is no reason to refuse
            what was asked for by name: that is for whoever knows the run.

    Raises:
        ValueError: naming every option that is unknown or has a bad value.
    """
    preset = get_preset(preset_name)
    given = given_options(additional_config)
    if not isinstance(given, dict):
        raise ValueError(
            f'fibquant options: additional_config["{SECTION}"] must be an object, got {given!r}; '
            'give for example {"prefill": "codes"}'
        )

    problems: list[str] = []
    if unknown := [repr(name) for name in given if name not in _NAMES]:
        problems.append(
            f"names must be among {', '.join(_NAMES)}, got {', '.join(unknown)}; remove them"
        )
    prefill, window = _parse_prefill(given, lacking, problems)
    values: dict[str, Any] = {"prefill": prefill, "recent_window": window}
    for name in _SWITCHES:
        values[name] = given.get(name, getattr(Options, name))
        if not isinstance(values[name], bool):
            problems.append(f"{name} must be true or false, got {values[name]!r}; leave it out")
    for name, most in _LARGEST.items():
        values[name] = number = given.get(name, values.get(name, DEFAULT_FIRST))
        if not _is_count(number) or number > most:
            problems.append(
                f"{name} must be an integer from 0 to {most}, got {number!r}; leave it out"
            )
    if prefill == "codes" and values["recent_window"]:
        problems.append(
            f'recent_window must be 0 when prefill is "codes", got {values["recent_window"]!r}; '
            'give "mode": "quality" or "prefill": "raw" with it'
        )
    retain = values["retain"] = _attempt(problems, _parse_retain, given.get("retain"))
    if retain and prefill == "raw":
        problems.append(
            'prefill must be "codes" with retain, got "raw"; leave it out: a step\'s new tokens '
            "would see each other at their distance in the text, not in what is kept"
        )
    values["monitor"] = _attempt(problems, _parse_monitor, given.get("monitor"))
    values["calibration"] = given.get("calibration")
    values["calibrate"] = _parse_calibrate(given, lacking, retain, problems)
    values["layers"] = _attempt(problems, parse_layers, given.get("layers")) or ()
    if preset_name in dict(values["layers"]).values():
        problems.append(
            f"layers must have another preset than --kv-cache-dtype, got {preset_name}; leave "
            "those layers out"
        )
    overrides = {name: given[name] for name in _PRESET_NAMES if name in given}
    preset = _attempt(problems, preset.with_overrides, overrides) or preset
    if problems:
        raise ValueError("fibquant options: " + "\n  also: ".join(problems))
    return Options(preset=preset, **values)


def _attempt(problems: list[str], parse: Callable[[Any], Any], given: Any) -> Any:
    """What `parse` makes of `given`; None if it refuses, which becomes one of the problems."""
    try:
        return parse(given)
    except ValueError as error:
        problems.append(str(error).removeprefix("fibquant options: "))
        return None


def _parse_prefill(
    given: dict[str, Any], lacking: Collection[Part], problems: list[str]
) -> tuple[Any, int]:
    """`prefill`, and the recent window where none is asked for."""

    def choose(name: str, among: tuple[str, str], default: str) -> Any:
        value = given.get(name, default)
        if value not in among:
            problems.append(
                f'{name} must be "{among[0]}" or "{among[1]}", got {value!r}; use "{among[0]}" for '
                f'results that do not depend on what was cached, "{among[1]}" for better text at '
                "low rates"
            )
        return value

    # Who keeps a bounded cache has no use for new tokens at their distance in the text.
    has_copies = "copies" not in lacking and given.get("retain") is None
    mode = choose("mode", get_args(Mode), DEFAULT_MODE if has_copies else "exact")
    prefill, window = _MODES[mode if mode in get_args(Mode) else "exact"]
    prefill = choose("prefill", get_args(PrefillMode), prefill)
    # What the mode would add contradicts what was asked for.
    return prefill, 0 if "prefill" in given and prefill == "codes" else window


def _parse_calibrate(
    given: dict[str, Any], lacking: Collection[Part], retain: Retain | None, problems: list[str]
) -> Any:
    """`calibrate`, once `calibration` suits it."""
    calibration = given.get("calibration")
    can_measure = "calibration" not in lacking and given.get("retain") is None
    default = DEFAULT_CALIBRATE if can_measure or calibration is not None else "none"
    calibrate = given.get("calibrate", default)
    if calibrate not in get_args(Calibrate):
        names = " or ".join(f'"{name}"' for name in get_args(Calibrate))
        problems.append(f"calibrate must be {names}, got {calibrate!r}; leave it out")
    is_path = isinstance(calibration, str) and calibration != ""
    if calibration is not None and (not is_path or calibrate == "none"):
        problems.append(
            f'calibration must be the path of a file, given with "calibrate", got {calibration!r} '
            f'with "calibrate": {calibrate!r}; leave it out'
        )
    if calibrate == "auto" and retain:
        return "none"
    if calibrate != "none" and retain:
        problems.append(
            f'calibrate must be "none" with retain, got {calibrate!r}; leave one of them out: '
            "both treat the first tokens apart, and differently"
        )
    return calibrate


def parse_layers(given: Any) -> tuple[tuple[int, str], ...]:
    """Layers that have a preset of their own: number and preset, in order of numbers.

    Args:
        given: an object of layers ("0-1,29") and presets; None for no layers.

    Raises:
        ValueError: naming the value.
    """
    if given is None:
        return ()
    example = 'give for example {"0-1,29": "fibquant_k5v3"}'
    if not isinstance(given, dict):
        raise ValueError(
            f"layers must be an object of layers and presets, got {given!r}; {example}"
        )
    presets: dict[int, str] = {}
    for text, name in given.items():
        if not (isinstance(name, str) and is_fibquant(name)):
            raise ValueError(
                f"layers must have presets among {', '.join(PRESETS)}, got {name!r}; {example}"
            )
        for part in str(text).split(","):
            match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
            numbers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
            if not numbers:
                raise ValueError(
                    f"layers must be numbers and ranges such as 0-1,29, got {text!r}; {example}"
                )
            twice = presets.keys() & numbers
            if twice:
                raise ValueError(
                    f"layers must name each layer once, got layer {min(twice)} twice; leave one out"
                )
            presets.update(dict.fromkeys(numbers, name))
    return tuple(sorted(presets.items()))


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _parse_retain(given: Any) -> Retain | None:
    """What to keep; None means everything.

    Raises:
        ValueError: naming the value.
    """
    if given is None:
        return None

    if (
        not isinstance(given, dict)
        or not given.keys() <= {"first", "recent"}
        or not _is_count(given.get("recent"), least=1)
        or not _is_count(given.get("first", 0))
    ):
        raise ValueError(
            'retain must be an object with "recent", a number of tokens of at least 1, and '
            f'optionally "first", one of at least 0, got {given!r}; give for example '
            '{"first": 4, "recent": 1024}'
        )
    return Retain(**given)


def _parse_monitor(given: Any) -> MonitorOptions | None:
    """What the monitor may take; None means it is off.

    Raises:
        ValueError: naming the value.
    """
    if given is None or given is False:
        return None
    values = {} if given is True else given
    if isinstance(values, dict) and values.keys() <= {"budget", "tokens"}:
        budget = values.get("budget", MonitorOptions.budget)
        tokens = values.get("tokens", MonitorOptions.tokens)
        is_number = isinstance(budget, int | float) and not isinstance(budget, bool)
        if is_number and 0 < budget <= MAX_MONITOR_BUDGET and _is_count(tokens, least=64):
            return MonitorOptions(float(budget), tokens)
    raise ValueError(
        'monitor must be true, false or an object with "budget", a share of step time above 0 and '
        f'at most {MAX_MONITOR_BUDGET}, and "tokens", a number of at least 64, got {given!r}; '
        "give true"
    )
