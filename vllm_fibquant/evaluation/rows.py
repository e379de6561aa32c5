# SPDX-License-Identifier: Apache-2.0
"""Everything that is measured. A new row of ours is one line: a name, a preset, its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_fibquant.codec.config import PRESETS, CodeSpec, Preset, is_fibquant
from vllm_fibquant.evaluation.formats import BuiltFibQuant, FibQuant, Format, Perturbed, Rounded
from vllm_fibquant.evaluation.rivals import GgmlQ4, Int4PerToken, Kivi, KVQuant, TurboQuant
from vllm_fibquant.options import QUALITY_WINDOW, parse_options

Group = Literal["uncompressed", "quality", "exact", "uncalibrated", "published", "ablation",
                "rival", "windowed", "check", "frontier"]  # fmt: skip

PUBLISHED: dict[str, Any] = {"key": {"gain": "norm"}, "value": {"gain": "norm"}}
"""The stored norm is the vector's own, as in arXiv 2605.11478."""
EXACT: dict[str, Any] = {"mode": "exact"}
PLAIN: dict[str, Any] = {"mode": "exact", "calibrate": "none"}

EXACT_STEP = 256
"""Tokens prefilled at once where their number changes nothing but the time taken."""

LADDER = ("fibquant_4bit", "fibquant_3bit", "fibquant_2bit", "fibquant_1bit")
"""The presets that every model is measured with."""


@dataclass(frozen=True)
class Row:
    """One format.

    Attributes:
        name: unique.
        group: heading it is reported under.
        cache_format: what it does to keys and values, for size, fidelity and simulation.
        engine: the preset and the fibquant options it is measured with through vLLM; None: it is
            simulated.
        step: tokens that the engine prefills at once.
        main: measured on all units; others on fewer texts, without pass keys and greedy answers.
        core: measured on every model, as main rows are; others complete the picture of one.
        texts, retrieval: whether it reads texts, and long ones with many keys.
        fidelity: `cache_format` knows all that is done to keys and values.
        quick: part of the quick suite.
    """

    name: str
    group: Group
    cache_format: Format
    engine: tuple[str, dict[str, Any]] | None = field(default=None, hash=False)
    step: int = EXACT_STEP
    main: bool = False
    core: bool = False
    quick: bool = False
    texts: bool = True
    retrieval: bool = False
    fidelity: bool = True

    @property
    def is_calibrated(self) -> bool:
        """Whether the model's keys are measured first."""
        if self.engine is None or not is_fibquant(self.engine[0]):
            return False
        preset, options = self.engine
        return parse_options(preset, {"fibquant": options}).calibrate != "none"

    @property
    def identity(self) -> str:
        """What decides this row's numbers, but for the code."""
        return repr((self.cache_format, self.engine, self.step))


def engine_row(
    name: str, group: Group, preset: str, options: dict[str, Any], step: int,
    **flags: bool,
) -> Row:  # fmt: skip
    """A row of ours, read through the engine.

    Args:
        options: as in --additional-config '{"fibquant": options}'.
        step: tokens prefilled at once where that matters.
        flags: main, core, quick, retrieval.
    """
    parsed = parse_options(preset, {"fibquant": options})
    step = step if parsed.prefill == "raw" else EXACT_STEP
    known = FibQuant.from_options(parsed, step)
    return Row(name, group, known, (preset, options), step, **flags)


def all_rows(step: int) -> list[Row]:
    """The rows of the full suite, in the order of the table.

    Args:
        step: tokens prefilled at once in mode quality.
    """
    rows = [
        Row("bf16", "uncompressed", Rounded("bfloat16"), main=True, quick=True),
        Row("fp8 e4m3", "uncompressed", Rounded("float8_e4m3fn"), main=True, quick=True),
        Row("uncompressed", "uncompressed", Format(), ("auto", {}), main=True, texts=False,
            retrieval=True),
    ]  # fmt: skip
    modes: dict[Group, dict[str, Any]] = {"quality": {}, "exact": EXACT}
    for mode, options in modes.items():
        for preset in PRESETS:
            if preset == "fibquant":  # another name of one of the others
                continue
            rows.append(
                engine_row(
                    f"{_short(preset)}, {mode}", mode, preset, options, step,
                    main=preset in LADDER, core=preset in ("fibquant_k5v4", "fibquant_k5v3"),
                    quick=preset == "fibquant_2bit",
                    retrieval=mode == "quality" and preset in LADDER[1:3],
                )
            )  # fmt: skip
    ours = rows + _uncalibrated(step) + _ablation(step) + _splits(step)
    return ours + _rivals() + _checks(step) + _frontier()


def _short(preset: str) -> str:
    return preset.removeprefix("fibquant_")


def _uncalibrated(step: int) -> list[Row]:
    """As published, and ours without any measurement of the model's keys."""
    rows = []
    for preset in ("fibquant_k5v3", *LADDER):
        rows.append(
            engine_row(f"{_short(preset)}, exact, uncalibrated", "uncalibrated", preset, PLAIN,
                       step, core=preset == "fibquant_k5v3", quick=preset == "fibquant_2bit")
        )  # fmt: skip
    for preset in ("fibquant_k5v3", *LADDER[1:3]):
        rows.append(
            engine_row(f"{_short(preset)}, quality, uncalibrated", "uncalibrated", preset,
                       {"calibrate": "none"}, step, core=preset == "fibquant_3bit")
        )  # fmt: skip
    return rows + [
        engine_row(f"{_short(preset)} as published", "published", preset, {**PLAIN, **PUBLISHED},
                   step, quick=preset == "fibquant_2bit")
        for preset in LADDER
    ]  # fmt: skip


def _ablation(step: int) -> list[Row]:
    """What each repair does that is not in the rows above."""
    rows = [
        engine_row("4bit, exact, means", "ablation", "fibquant_4bit",
                   {**EXACT, "calibrate": "means"}, step),
    ]  # fmt: skip
    for preset in LADDER[2:]:
        rows.append(engine_row(f"{_short(preset)}, quality, window 256", "ablation", preset,
                               {"recent_window": 256}, step))  # fmt: skip
    for preset in LADDER[:3]:
        for kind in ("means", "transform"):
            rows.append(engine_row(f"{_short(preset)}, quality, {kind}", "ablation", preset,
                                   {"calibrate": kind}, step))  # fmt: skip
    for preset in LADDER[1:3]:
        bits, codes = _short(preset), parse_options(preset, {"fibquant": PLAIN}).preset
        repairs: dict[str, dict[str, Any]] = {
            f"gains, window {QUALITY_WINDOW}": {"first_tokens": 0},
            f"published gains, window {QUALITY_WINDOW}, first 4": PUBLISHED,
        }
        for name, options in repairs.items():
            rows.append(engine_row(f"{bits}, {name}", "ablation", preset,
                                   {"calibrate": "none", **options}, step))  # fmt: skip
        rows.append(Row(f"{bits}, gains, first 4", "ablation", FibQuant(codes, first=4)))
    return rows


def _splits(step: int) -> list[Row]:
    """Splits of bits between keys and values that are no preset: whose errors a loss is made of."""
    splits: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
        ("k2v1, quality", "fibquant_2bit", "fibquant_1bit", {}),
        ("k1v2, quality", "fibquant_1bit", "fibquant_2bit", {}),
        ("k3v4, exact", "fibquant_3bit", "fibquant_4bit", EXACT),
    )
    parts = ("subvec_dim", "num_codewords", "folded", "storage")
    rows = []
    for name, keys, values, options in splits:
        value = {part: getattr(PRESETS[values].value, part) for part in parts}
        rows.append(engine_row(name, "ablation", keys, {**options, "value": value}, step))
    return rows


def _rivals() -> list[Row]:
    """Formats that read everything as stored stand beside mode exact, those that keep tokens in 16
    bits beside mode quality; KIVI's own residual is 128."""
    rows = [
        Row("int4 per token", "rival", Int4PerToken()),
        Row("q4_0", "rival", GgmlQ4(), core=True),
        Row("q4_0, rotated", "rival", GgmlQ4(rotated=True), core=True, quick=True),
    ]
    for bits in (4, 3, 2):
        rows += [
            Row(f"TurboQuant {bits} bits", "rival", TurboQuant(bits), core=True, quick=bits == 3),
            Row(f"TurboQuant {bits} bits, norm-corrected", "rival", TurboQuant(bits, True)),
        ]
    rows += [
        Row(f"KVQuant {bits} bits, 1 % outliers", "rival", KVQuant(bits), core=bits == 3)
        for bits in (4, 3)
    ]
    for residual in (0, 64, 128):
        rows += [
            Row(f"KIVI {bits} bits, residual {residual}", "windowed" if residual else "rival",
                Kivi(bits, residual), core=residual != 64, quick=residual == 128)
            for bits in (4, 2)
        ]  # fmt: skip
    return rows


def _checks(step: int) -> list[Row]:
    """Engine and simulation of the same format, and how far two equal runs may lie apart."""
    rows = [Row("uncompressed, simulated", "check", Format(), quick=True, fidelity=False)]
    modes: dict[str, dict[str, Any]] = {"exact": PLAIN, "quality": {"calibrate": "none"}}
    for mode, options in modes.items():
        known = FibQuant.from_options(parse_options("fibquant_2bit", {"fibquant": options}), step)
        rows.append(
            Row(f"2bit, {mode}, uncalibrated, simulated", "check", known, quick=mode == "exact")
        )
    codes = parse_options("fibquant_2bit", {"fibquant": PLAIN}).preset
    return rows + [
        Row(f"2bit, exact, uncalibrated, perturbed {i}", "check", Perturbed(codes, seed=i),
            fidelity=False)
        for i in (1, 2)
    ]  # fmt: skip


def _frontier() -> list[Row]:
    """The ends of the published frontier, 5x and 34.1x: fidelity alone, as no preset has them."""
    rows = []
    for label, spec in {
        "5x, k=4 N=4096": CodeSpec(4, 4096, num_lists=0),
        "5x, k=2 N=64": CodeSpec(2, 64, storage="float16"),
        "34.1x of 32 bits, k=16 N=2048": CodeSpec(16, 2048),
        "34.1x of 16 bits, k=32 N=128": CodeSpec(32, 128),
    }.items():
        codes = Preset("frontier", spec, spec)
        best = codes.with_overrides({"key": {"gain": "mse"}, "value": {"gain": "mse"}})
        rows += [
            Row(f"{label}, as published", "frontier", BuiltFibQuant(codes)),
            Row(f"{label}, gains", "frontier", BuiltFibQuant(best)),
            Row(
                f"{label}, gains, window {QUALITY_WINDOW}, first 4",
                "frontier",
                BuiltFibQuant(best, QUALITY_WINDOW, 4, 1),
            ),
        ]
    return rows
