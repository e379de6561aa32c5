# SPDX-License-Identifier: Apache-2.0
"""`prefill: codes`: an answer does not depend on what was cached, chunked, batched or preempted.

Every comparison is of tokens and log-probabilities, bit by bit, through the real engine. The
matrix products of vLLM's CPU build (oneDNN in float32) give each row the same bits whatever the
number of rows: for the small models here on every processor, for models as wide as real ones with
AVX2 and not with AVX-512 (`test_nothing_matters_at_the_widths_of_a_real_model`). Where they do, the
whole engine is exact, not just attention. Stock vLLM is not: with `auto` the same change of batch
alters a quarter to a half of the answers, because its attention splits work differently;
`test_stock_for_comparison` prints by how much.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from .harness import (
    Answer,
    cache_tensors,
    engine,
    generate,
    in_batches,
    largest_difference,
    num_preemptions,
    one_by_one,
    varied_prompts,
)
from .models import VOCAB_SIZE, make_model

NUM_PROMPTS = 200
NUM_TOKENS = 2
CROWD_TOKENS = 40
FEW_BLOCKS = 24  # 767 tokens: eight requests of up to 202 tokens do not fit


def run_everything(
    model: str,
    kv_cache_dtype: str,
    prompts: list[list[int]],
    num_tokens: int,
    few_blocks: int = FEW_BLOCKS,
    **settings,
) -> dict:
    """Answers to `prompts` under every change that must not matter, by name of the change.

    The prompts of the preempted run are followed by a crowd: eight requests that fit when they
    are admitted and outgrow the cache while they generate, so that some are sure to be preempted.
    """
    room = few_blocks * 32 // 8  # tokens per request of a crowd of eight
    longest = sorted(prompts, key=len)[-8:]
    # All eight are admitted, and end needing one block more than there is: one block is vLLM's own.
    crowd = [prompt[: room - CROWD_TOKENS] for prompt in longest]

    def run(**changes):
        return engine(model, kv_cache_dtype, **{**settings, **changes})

    answers: dict[str, list[Answer]] = {}
    with run() as llm:
        answers["alone"] = one_by_one(llm, prompts, num_tokens)
        answers["batch of 8"] = in_batches(llm, prompts, num_tokens)
        answers["alone"] += one_by_one(llm, crowd, CROWD_TOKENS)
        answers["batch of 8"] += generate(llm, crowd, CROWD_TOKENS)
    with run(enable_prefix_caching=True) as llm:
        answers["prefix cache, first request"] = one_by_one(llm, prompts, num_tokens)
        answers["prefix cache, repeat"] = in_batches(llm, prompts, num_tokens, batch=4)
    for chunk in (32, 48):
        with run(max_num_batched_tokens=chunk) as llm:
            answers[f"chunks of {chunk}"] = in_batches(llm, prompts, num_tokens)
    with run(num_gpu_blocks_override=few_blocks, max_model_len=few_blocks * 32 // 3) as llm:
        answers["preempted"] = in_batches(llm, prompts, num_tokens)
        answers["preempted"] += generate(llm, crowd, CROWD_TOKENS)
        assert num_preemptions(llm) > 0, "the cache was not too small"
    return answers


def report(answers: dict) -> list[str]:
    """One line per change: how many answers differ, and by how much."""
    return [
        "{:28s} {:3d} answers: other tokens {:3d}, not bit-equal {:3d}, largest {:.1e}".format(
            change, len(given), *largest_difference(answers["alone"][: len(given)], given)
        )
        for change, given in answers.items()
        if change != "alone"
    ]


def assert_exact(answers: dict) -> None:
    repeats = answers["prefix cache, repeat"]
    assert sum(answer.num_cached for answer in repeats) > 50 * len(repeats), "not cached"
    print("\n" + "\n".join(report(answers)))
    for change, given in answers.items():
        expected = answers["alone"][: len(given)]
        assert [a.bits for a in given] == [a.bits for a in expected], change


def test_nothing_matters(model_folder):
    prompts = varied_prompts(NUM_PROMPTS, VOCAB_SIZE)
    answers = run_everything(
        make_model("llama", model_folder), "fibquant_2bit", prompts, NUM_TOKENS
    )
    assert_exact(answers)


def test_nothing_matters_with_sliding_windows(model_folder):
    prompts = varied_prompts(24, VOCAB_SIZE, seed=1)
    answers = run_everything(make_model("gemma2", model_folder), "fibquant_3bit", prompts, 3)
    assert_exact(answers)


def test_nothing_matters_for_long_prompts(model_folder):
    """Contexts beyond one split of the attention kernel, whose parts are merged."""
    prompts = varied_prompts(8, VOCAB_SIZE, longest=900, shortest=400, seed=6)
    answers = run_everything(
        make_model("llama", model_folder), "fibquant_2bit", prompts, 2, 96, max_model_len=1024
    )
    assert_exact(answers)


def rows_differ_in_batches(num_in: int, num_out: int) -> bool:
    """Whether vLLM's own linear layer of this width gives a row other bits alone than in batches:
    then an engine is not exact, whatever its attention is."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(num_in, num_out, bias=False).requires_grad_(False)
    layer.weight.normal_(0, 0.1, generator=generator)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    x = torch.randn(48, num_in, generator=generator)
    alone = torch.cat([layer.cpu_linear(row[None], layer.weight, None) for row in x])
    return any(
        not torch.equal(layer.cpu_linear(x[:count], layer.weight, None), alone[:count])
        for count in (2, 8, 33, 48)
    )


def skip_unless_products_are_exact(widths: dict[str, tuple[int, int]]) -> None:
    wrong = [name for name, width in widths.items() if rows_differ_in_batches(*width)]
    if wrong:
        pytest.skip(
            f"oneDNN gives rows of this processor's {', '.join(wrong)} other bits in batches than "
            "alone; with ONEDNN_MAX_CPU_ISA=AVX2 it does not"
        )


SMOL_WIDTHS = {"qkv": (576, 960), "o": (576, 576), "gate and up": (576, 3072), "down": (1536, 576)}


def test_nothing_matters_at_the_widths_of_a_real_model(model_folder):
    skip_unless_products_are_exact(SMOL_WIDTHS)
    prompts = varied_prompts(24, VOCAB_SIZE, seed=4)
    assert_exact(
        run_everything(make_model("llama-wide", model_folder), "fibquant_2bit", prompts, 2)
    )


@pytest.mark.slow
def test_the_setting_that_makes_products_exact():
    """What the skip above and the documents say, in a process that has it."""
    name = f"{__file__}::{test_nothing_matters_at_the_widths_of_a_real_model.__name__}"
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True,
        timeout=1200,
    )  # fmt: skip
    assert "1 passed" in found.stdout, found.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fibquant_2bit", "fibquant"])
def test_nothing_matters_for_a_real_model(preset):
    from vllm_fibquant.demo_model import ensure_demo_model

    skip_unless_products_are_exact(SMOL_WIDTHS)
    prompts = varied_prompts(NUM_PROMPTS, 49_000, seed=2)
    assert_exact(run_everything(str(ensure_demo_model()), preset, prompts, 4))


@pytest.mark.slow
def test_stock_for_comparison(model_folder):
    """Not a test of ours: shows what the same changes do to vLLM's own cache."""
    prompts = varied_prompts(NUM_PROMPTS, VOCAB_SIZE)
    answers = run_everything(make_model("llama", model_folder), "auto", prompts, NUM_TOKENS)
    print("\n" + "\n".join(report(answers)))


@pytest.mark.parametrize("prefill", ["codes", "raw"])
def test_unwritten_slots_are_never_read(model_folder, prefill):
    """Bytes nobody wrote are NaN norms here; reading one would change the answer."""
    prompts = varied_prompts(16, VOCAB_SIZE, seed=3)
    model = make_model("gemma2", model_folder)
    answers = []
    for poison in (0x00, 0xFF):
        with engine(model, "fibquant_2bit", fibquant={"prefill": prefill}) as llm:
            caches = cache_tensors(llm)
            assert caches
            for cache in caches:
                cache.fill_(poison)
            answers.append(in_batches(llm, prompts, 4))
    assert [a.bits for a in answers[0]] == [a.bits for a in answers[1]]


def test_other_requests_are_never_read(model_folder):
    """`raw`: an answer is the same alone, and in a cache full of other requests' codes."""
    prompts = varied_prompts(24, VOCAB_SIZE, seed=4)
    model = make_model("llama", model_folder)
    with engine(model, "fibquant_2bit", fibquant={"prefill": "raw"}) as llm:
        alone = one_by_one(llm, prompts[:8], 4)
        in_batches(llm, prompts[8:], 4)
        together = generate(llm, prompts[:8], 4)
    assert [a.bits for a in alone] == [a.bits for a in together]


def test_raw_repeat_differs_by_the_code_of_the_prefix_alone(model_folder):
    """`raw`: a cached repeat reads codes where the first request read raw keys and values.

    The difference is that of quantising the cached prefix: present, bounded by what the same
    preset loses in `codes` mode against raw, and zero where nothing was cached.
    """
    prompts = varied_prompts(24, VOCAB_SIZE, seed=5)
    model = make_model("llama", model_folder)
    with engine(
        model, "fibquant_4bit", fibquant={"prefill": "raw"}, enable_prefix_caching=True
    ) as llm:
        first, repeat = [], []
        for prompt in prompts:
            llm.reset_prefix_cache()
            first += generate(llm, [prompt], 1)
            repeat += generate(llm, [prompt], 1)
    with engine(model, "fibquant_4bit", fibquant={"prefill": "codes"}) as llm:
        codes = one_by_one(llm, prompts, 1)
    _, _, bound = largest_difference(first, codes)
    for a, b in zip(first, repeat, strict=True):
        if b.num_cached == 0:
            assert a.bits == b.bits
    other, changed, largest = largest_difference(first, repeat)
    print(f"\ncached repeat: {changed}/{len(first)} differ, by at most {largest:.4f} ({bound:.4f})")
    assert changed > 0
    assert largest <= 2 * bound
