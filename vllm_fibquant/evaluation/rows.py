# SPDX-License-Identifier: Apache-2.0
"""Everything that is measured. A new row of ours is one line: a name, a preset, its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_fibquant.codec.config import CodeSpec, Preset
from vllm_fibquant.evaluation.formats import BuiltFibQuant, FibQuant, Format, Perturbed, Rounded
from vllm_fibquant.evaluation.rivals import GgmlQ4, Int4PerToken, Kivi, KVQuant, TurboQuant
from vllm_fibquant.options import parse_options

Group = Literal["uncompressed", "published", "exact", "quality", "ablation", "rival", "check",
                "frontier"]  # fmt: skip

PLAIN: dict[str, Any] = {"mode": "exact", "calibrate": "none"}
"""What rows leave out: codes alone, without what the product adds by default."""

PUBLISHED: dict[str, Any] = {"key": {"gain": "norm"}, "value": {"gain": "norm"}}
"""The stored norm is the vector's own, as in arXiv 2605.11478."""

EXACT_STEP = 256
"""Tokens prefilled at once where their number changes nothing but the time taken."""


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
        main: measured on all units; others on fewer texts, without passkeys and greedy answers.
        fidelity: `cache_format` knows all that the engine does.
        quick: part of the quick suite.
    """

    name: str
    group: Group
    cache_format: Format
    engine: tuple[str, dict[str, Any]] | None = field(default=None, hash=False)
    step: int = EXACT_STEP
    main: bool = False
    quick: bool = False
    fidelity: bool = True

    @property
    def is_calibrated(self) -> bool:
        """Whether the model's keys are measured first."""
        return self.engine is not None and "calibrate" in self.engine[1]

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
        flags: main, quick; fidelity=False where `formats.FibQuant` does not know the options.
    """
    parsed = parse_options(preset, {"fibquant": {**PLAIN, **options}})
    step = step if parsed.prefill == "raw" else EXACT_STEP
    known = FibQuant.from_options(parsed, step)
    return Row(name, group, known, (preset, options), step, **flags)


def all_rows(step: int) -> list[Row]:
    """The rows of the full suite, in the order of the table.

    Args:
        step: tokens prefilled at once in mode quality.
    """
    quality = {"mode": "quality"}
    rows = [
        Row("bf16", "uncompressed", Rounded("bfloat16"), main=True, quick=True),
        Row("float32 through vLLM", "check", Format(), ("auto", {}), quick=True),
        Row("fp8 e4m3", "uncompressed", Rounded("float8_e4m3fn"), main=True, quick=True),
    ]
    for bits in ("4bit", "3bit", "2bit", "1bit"):
        rows.append(
            engine_row(f"{bits} as published", "published", f"fibquant_{bits}", PUBLISHED, step,
                       main=bits != "1bit", quick=bits == "2bit")
        )  # fmt: skip
    for preset, main in {
        "k5v3": True, "4bit": True, "k4v3": False, "k4v2": False, "3bit": True, "k3v2": False,
        "2bit": True, "k3v1": False, "1bit": False,
    }.items():  # fmt: skip
        rows.append(
            engine_row(f"{preset}, exact", "exact", f"fibquant_{preset}", {}, step, main=main,
                       quick=preset in ("k5v3", "2bit"))
        )  # fmt: skip
    for preset, main in {
        "k5v3": True, "k4v2": False, "3bit": True, "k3v2": False, "2bit": True, "k3v1": False,
        "1bit": False,
    }.items():  # fmt: skip
        rows.append(
            engine_row(f"{preset}, quality", "quality", f"fibquant_{preset}", quality, step,
                       main=main, quick=preset == "2bit")
        )  # fmt: skip
    rows += _calibrated(step)
    rows += _ablation(step)
    rows += _rivals()
    modes: dict[str, dict[str, Any]] = {"exact": {}, "quality": quality}
    for mode, options in modes.items():
        parsed = parse_options("fibquant_2bit", {"fibquant": {**PLAIN, **options}})
        known = FibQuant.from_options(parsed, step)
        rows.append(Row(f"2bit, {mode}, simulated", "check", known, quick=mode == "exact"))
    codes = parse_options("fibquant_2bit").preset
    rows += [
        Row(f"2bit, exact, perturbed {i}", "check", Perturbed(codes, seed=i), fidelity=False)
        for i in (1, 2)
    ]
    return rows + _frontier()


def _calibrated(step: int) -> list[Row]:
    """Ours with the model's keys measured first, on another text (docs/calibration.md)."""
    uses: dict[Group, dict[str, Any]] = {"exact": {}, "quality": {"mode": "quality"}}
    kinds = {"k5v3": ["means"], "4bit": ["means", "transform"], "3bit": ["means", "transform"],
             "k2v3": ["transform"], "2bit": ["means", "transform"],
             "1bit": ["means", "transform"]}  # fmt: skip
    headline = {("3bit", "transform"), ("2bit", "transform"), ("1bit", "transform")}
    return [
        engine_row(f"{preset}, {mode}, {kind}", mode, f"fibquant_{preset}",
                   {**options, "calibrate": kind}, step, fidelity=False,
                   main=(preset, kind) in headline)
        for preset, of_preset in kinds.items()
        for kind in of_preset
        for mode, options in uses.items()
        if mode == "quality" or preset != "1bit"
    ]  # fmt: skip


def _ablation(step: int) -> list[Row]:
    """What each repair does that is not in the rows above, at 3 and 2 bits."""
    rows = []
    for bits in ("3bit", "2bit"):
        preset = f"fibquant_{bits}"
        codes = parse_options(preset).preset
        repairs: dict[str, dict[str, Any]] = {
            "gains, window 64": {"mode": "quality", "first_tokens": 0},
            "published gains, window 64, first 4": {"mode": "quality", **PUBLISHED},
        }
        for name, options in repairs.items():
            rows.append(engine_row(f"{bits}, {name}", "ablation", preset, options, step))
        rows.append(Row(f"{bits}, gains, first 4", "ablation", FibQuant(codes, first=4)))
    return rows


def _rivals() -> list[Row]:
    rows = [
        Row("int4 per token", "rival", Int4PerToken()),
        Row("q4_0", "rival", GgmlQ4(), main=True, quick=True),
    ]
    for bits in (4, 3, 2):
        rows += [
            Row(
                f"TurboQuant {bits} bits", "rival", TurboQuant(bits), main=bits < 4, quick=bits != 3
            ),
            Row(f"TurboQuant {bits} bits, norm-corrected", "rival", TurboQuant(bits, True)),
        ]
    for bits in (4, 2):
        rows += [
            Row(f"KIVI {bits} bits, residual {r}", "rival", Kivi(bits, r), main=r == 32,
                quick=r == 32)
            for r in (0, 32, 128)
        ]  # fmt: skip
    return rows + [
        Row(f"KVQuant {bits} bits, 1 % outliers", "rival", KVQuant(bits), main=bits == 3)
        for bits in (4, 3)
    ]


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
            Row(f"{label}, gains, window 64, first 4", "frontier", BuiltFibQuant(best, 64, 4, 1)),
        ]
    return rows
