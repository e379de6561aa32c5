# SPDX-License-Identifier: Apache-2.0
"""The script for a GPU machine, as far as it goes without one: dry runs, report, micro-rates."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from benchmarks import (
    gpu_batches,
    gpu_engine,
    gpu_peers,
    gpu_proof,
    gpu_rates,
    gpu_report,
    gpu_timing,
)

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.long
def test_speed_and_rates_run_dry(tmp_path: Path) -> None:
    """Both sets of kernels answer alike in the script's own set-up, and peers are prepared."""
    pytest.importorskip("triton", reason="Triton is not installed")
    out = tmp_path / "gpu.jsonl"
    options = ("--dry-run", "--presets", "fibquant_2bit", "--out", str(out))
    run("benchmarks.gpu_proof", "speed", *options)
    run("benchmarks.gpu_proof", "rates", *options)
    speed, *encode = [json.loads(line) for line in out.read_text().splitlines()]
    assert speed["finite_cuda"] and speed["finite_triton"] and speed["difference"] < 0.02
    pytest.importorskip("vllm", reason="vLLM is not installed: its kernels were skipped")
    called = {"sdpa", "bf16", "fp8", "turboquant", "unified", "unified_fp8"}
    assert not called & {k.removeprefix("skipped_") for k in speed}
    assert {r["preset"] for r in encode} == {"fibquant_2bit", gpu_rates.STORE}
    assert all("torch" in row["versions"] and row["command"] for row in (speed, *encode))


@pytest.mark.long
def test_batches_run_dry(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    run("benchmarks.gpu_proof", "batches", "--dry-run", "--presets", "fibquant_2bit",
        "--out", str(out))  # fmt: skip
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["batches"] for row in rows] == list(gpu_batches.TINY)
    assert all(row["finite_fibquant_2bit"] for row in rows)
    pytest.importorskip("vllm", reason="vLLM is not installed: its kernels were skipped")
    assert not any("skipped_unified" in row or "skipped_unified_fp8" in row for row in rows)


class FakeCuda:
    """What `captured` needs of torch.cuda, counting."""

    def __init__(self, can_capture: bool = True) -> None:
        self.can_capture, self.capturing, self.replays = can_capture, False, 0

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def synchronize(self) -> None:
        assert not self.capturing

    def CUDAGraph(self):
        def replay() -> None:
            self.replays += 1

        return SimpleNamespace(replay=replay)

    @contextlib.contextmanager
    def stream(self, stream):
        yield

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False


def test_what_is_timed_is_a_replayed_graph() -> None:
    cuda, calls = FakeCuda(), []
    call, reason = gpu_timing.captured(lambda: calls.append(cuda.capturing), cuda)
    assert reason == "" and calls == [False] * gpu_timing.WARM_UPS + [True]
    call()
    assert cuda.replays == 1 and len(calls) == gpu_timing.WARM_UPS + 1  # Python runs no more


def test_what_cannot_be_captured_is_called_and_says_so() -> None:
    cuda = FakeCuda()

    def run() -> None:
        if cuda.capturing:
            raise RuntimeError("waits for the device")

    call, reason = gpu_timing.captured(run, cuda)
    assert call is run and reason == "RuntimeError: waits for the device"


def test_peers_are_given_their_scales() -> None:
    """Without them vLLM's kernel makes two on the device in every call."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    case = gpu_peers.Case(64, 1, 2, 2, 100, "cpu")
    for name in ("bf16", "fp8"):
        options = gpu_peers.PEERS[name](case)[0].keywords
        assert float(options["k_scale"]) == float(options["v_scale"]) == 1
    assert {"mid_o_buf", "output_buf", "lse_buf"} <= set(
        gpu_peers.PEERS["turboquant"](case)[0].keywords
    )


@pytest.mark.parametrize("fp8", [False, True])
def test_vllms_flash_attention_takes_the_call(fp8: bool) -> None:
    """Its Python file is in every build of vLLM; what it calls is not."""
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
    path = Path(vllm.__path__[0]) / "vllm_flash_attn" / "flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location("flash_attn_interface", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    case = gpu_batches.Lengths(64, 2, 4, (1, 1, 9), (40, 17, 33), "cpu")
    call, num_bytes = gpu_batches.flash(case, module.flash_attn_varlen_func, fp8)
    given = inspect.signature(call.func).bind(*call.args, **call.keywords).arguments
    assert num_bytes == 2 * 8 * 16 * 2 * 64 * (1 if fp8 else 2)
    assert given["cu_seqlens_q"].tolist() == [0, 1, 2, 11] and given["max_seqlen_k"] == 40
    assert sorted(given["block_table"].flatten().tolist()) == [0, *range(8)]
    assert given["q"].dtype == given["k"].dtype and given["out"].dtype == torch.bfloat16
    assert ("k_descale" in given) is fp8


def test_vllms_client_and_cache_know_what_the_engines_are_asked() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.benchmarks import serve
    from vllm.config.cache import CacheDType

    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    command = gpu_engine.client_command("model", "http://127.0.0.1:1", "folder", 8192, 256, 4)
    args = parser.parse_args(command[3:])
    assert (args.random_input_len, args.random_output_len, args.num_prompts) == (7936, 256, 16)
    theirs = {name for name in gpu_engine.FORMATS if not name.startswith("fibquant")}
    assert theirs <= set(get_args(CacheDType))


@pytest.mark.parametrize("part", ["build", "test", "sanitize"])
def test_other_parts_print_their_commands(part: str) -> None:
    lines = run("benchmarks.gpu_proof", part, "--dry-run").splitlines()
    assert len(lines) == (3 if part == "sanitize" else 1)
    named = [word for line in lines for word in line.split() if word.endswith(".py")]
    assert named and all((ROOT / name).exists() for name in named)


def test_micro_rates_compile(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    target = tmp_path / "rates.so"
    subprocess.run(gpu_rates.build_command("90", target), check=True)
    symbols = subprocess.run(["nm", "-D", target], capture_output=True, text=True).stdout
    assert "T fq_rate" in symbols and "T fq_read" in symbols
    entries = (ROOT / "benchmarks" / "gpu_rates.cu").read_text().split("enum Op {")[1].split("}")[0]
    assert len(entries.split(",")) == len(gpu_rates.OPS)


def lines_of_a_gpu() -> list[dict]:
    """Made-up lines: a case whose numbers are easy to check, and one where little ran."""
    shared = {"device": "Made-up GPU", "versions": "torch 0", "command": "speed"}
    case = {"shape": [128, 8, 4], "batch": 32, "context": 32768, "bytes": 1, **shared}
    return [
        {**case, "preset": "fibquant_2bit", "ms_cuda": 0.5, "ms_triton": 2.0, "ms_sdpa": 4.0,
         "ms_bf16": 3.0, "ms_fp8": 1.0, "roofline_cuda": 0.75, "roofline_triton": 0.2},
        {**case, "preset": "fibquant_4bit", "batch": 1, "ms_triton": 2.0, "ms_bf16": 1.0,
         "roofline_triton": 0.1, "skipped_xformers": "ImportError: none"},
        {"rate": "copy", "gb_per_s": 4000.0, **shared},
        {"rate": "gather_8", "per_clock_and_sm": 0.48, "predicted": 0.5, **shared},
        {"rate": "encode", "preset": "fibquant_2bit", "tokens": 128, "us": 12.5, **shared},
    ]  # fmt: skip


def test_report_writes_table_and_plot(tmp_path: Path) -> None:
    results, table, image = (tmp_path / name for name in ("gpu.jsonl", "gpu.md", "gpu.png"))
    results.write_text("".join(json.dumps(line) + "\n" for line in lines_of_a_gpu()))
    run("benchmarks.gpu_report", str(results), "--out", str(table), "--image", str(image))
    text = table.read_text()
    row = "| 32 | 32768 | `fibquant_2bit` | cuda | 500.0 | 6.00x | bf16 | 2.00x | – | 75% |"
    assert row in text
    assert "| `fibquant_4bit` | triton | 2000.0 | 0.50x |" in text
    assert "| 2 bits, batch 32 x 32k: 5 times bf16 | 6.00 | met |" in text
    assert "| 2 bits, batch 32 x 32k: 2.5 times fp8 | 2.00 | missed |" in text
    assert "| 4 bits, batch 32 x 32k: 3.4 times bf16 | – | not measured |" in text
    assert "| gather_8 | 0.480 a clock | 0.5 |" in text and "| copy | 4000 GB/s | – |" in text
    assert "| 128 | fibquant_2bit | 12.5 |" in text and "- xformers: ImportError: none" in text
    assert image.stat().st_size > 1000


def test_report_shows_batches_engines_and_what_was_no_graph() -> None:
    lines = [
        *lines_of_a_gpu(),
        {"batches": "prompt of 2k", "of": [128, 8, 4], "ms_vllm_flash": 0.25,
         "ms_fibquant_2bit": 0.5, "eager_vllm_flash": "RuntimeError: no"},
        {"engine": "auto", "concurrency": 16, "cache_tokens": 1000, "output_tokens_per_s": 900.4,
         **dict.fromkeys(gpu_engine.MEASURED, 10.0)},
        {"engine": "fp8", "cache_tokens": 1, "skipped_fp8": "status 1"},
    ]  # fmt: skip
    text = gpu_report.markdown(lines)
    assert "| prompt of 2k | 128, 8 x 4 | 0.250 | 0.500 |" in text
    assert "| auto | 16 | 1000 | 10.0, 10.0 | 10.0, 10.0 | 900 |" in text
    assert "Timed as calls, not as CUDA graphs, which they do not allow: vllm_flash." in text
    assert "- fp8: status 1" in text


def test_report_refuses_a_file_without_times(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"rate": "copy", "gb_per_s": 1.0}\n')
    command = [sys.executable, "-m", "benchmarks.gpu_report", str(empty)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "got none with times" in result.stderr


def test_speed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    results = tmp_path / "gpu.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines_of_a_gpu()))
    assert gpu_proof.done_cases(results) == {
        ((128, 8, 4), 32, 32768, "fibquant_2bit"),
        ((128, 8, 4), 1, 32768, "fibquant_4bit"),
    }
    assert gpu_proof.done_cases(None) == gpu_proof.done_cases(tmp_path / "none") == set()


def test_the_cases_are_those_of_the_targets() -> None:
    assert gpu_proof.SHAPES[0] == gpu_report.TARGET_SHAPE
    assert {(d, group) for d, _, group in gpu_proof.SHAPES} == {
        (d, group) for d in (64, 128) for group in (1, 4, 8)
    }
