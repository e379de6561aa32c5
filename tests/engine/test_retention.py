# SPDX-License-Identifier: Apache-2.0
"""Requests whose cache is bounded to their first and their newest tokens."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import PRESETS

from .harness import (
    engine,
    generate,
    largest_difference,
    num_preemptions,
    one_by_one,
    varied_prompts,
)
from .models import VOCAB_SIZE, make_model
from .test_parallel import ask_all, server

BLOCK_SIZE = 32
RETAIN = {"first": 4, "recent": 70}
CHUNK = 64
# First blocks, window and one chunk in flight, and the block the window begins in.
MOST_BLOCKS = 1 + -(-(70 - 1 + CHUNK) // BLOCK_SIZE) + 1
LONG = {"max_model_len": 2048, "max_num_batched_tokens": CHUNK}


def retaining(model: str, preset: str = "fibquant_3bit", retain=RETAIN, **settings):
    return engine(model, preset, fibquant={"retain": retain}, **{**LONG, **settings})


@contextlib.contextmanager
def counted_blocks(llm):
    """Yields a list of one number: the most blocks that were in use at a time."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    take, most = pool.get_new_blocks, [0]

    def counted(num_blocks: int):
        blocks = take(num_blocks)
        most[0] = max(most[0], pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        return blocks

    pool.get_new_blocks = counted
    try:
        yield most
    finally:
        pool.get_new_blocks = take


@contextlib.contextmanager
def checked_promises(llm):
    """Yields a list with the blocks each allocation took; checks that it took what it announced."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    pool = manager.block_pool
    ask, finish = manager.get_num_blocks_to_allocate, manager.cache_blocks
    announced, taken = [], []

    def asked(*args, apply_admission_cap=False, **kwargs):
        count = ask(*args, apply_admission_cap=apply_admission_cap, **kwargs)
        if not apply_admission_cap:
            announced.append((pool.get_num_free_blocks(), count))
        return count

    def finished(*args, **kwargs):
        free, count = announced.pop()
        taken.append(count)
        assert free - pool.get_num_free_blocks() == count
        return finish(*args, **kwargs)

    manager.get_num_blocks_to_allocate, manager.cache_blocks = asked, finished
    try:
        yield taken
    finally:
        manager.get_num_blocks_to_allocate, manager.cache_blocks = ask, finish


def bits(answers) -> list:
    return [answer.bits for answer in answers]


def prompt_logprobs(llm, tokens: list[int]) -> torch.Tensor:
    """Log-probability of every token but the first, given those before it."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    steps = output.prompt_logprobs[1:]
    return torch.tensor([s[t].logprob for s, t in zip(steps, tokens[1:], strict=True)])


# ---- memory --------------------------------------------------------------------------------------


def test_memory_is_flat_and_the_cache_smaller_than_the_request(model_folder):
    """A pool of 12 blocks serves requests of 30 and more, alone and together."""
    model = make_model("llama", model_folder)
    prompts = varied_prompts(2, VOCAB_SIZE, longest=900, shortest=890)
    with retaining(model, num_gpu_blocks_override=13) as llm:
        with counted_blocks(llm) as most:
            (short,) = generate(llm, [prompts[0][:300]], 4)
        assert most[0] <= MOST_BLOCKS
        with counted_blocks(llm) as longer:
            (long,) = generate(llm, [prompts[0]], 700)
        assert longer == most
        with counted_blocks(llm) as two:
            together = generate(llm, prompts, 40)
        assert most[0] < two[0] <= 2 * MOST_BLOCKS
        alone = one_by_one(llm, prompts, 40)
        pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == 12
    assert len(long.tokens) == 700
    assert len(short.tokens) == 4
    assert bits(together) == bits(alone)


# ---- exactness -----------------------------------------------------------------------------------


def test_nothing_matters(model_folder):
    """Chunks, batches, preemption and a cached prefix change no bit."""
    model = make_model("llama", model_folder)
    prompts = varied_prompts(10, VOCAB_SIZE, longest=400, shortest=20)
    prompts += [prompts[9] + prompts[0], prompts[9][:200] + prompts[1]]  # share a long prefix
    with retaining(model) as llm:
        alone = bits(one_by_one(llm, prompts, 40))
        assert bits(generate(llm, prompts, 40)) == alone
    with retaining(model, max_num_batched_tokens=1024) as llm:
        assert bits(generate(llm, prompts, 40)) == alone
    with retaining(model, max_num_batched_tokens=48, num_gpu_blocks_override=11) as llm:
        assert bits(generate(llm, prompts, 40)) == alone
        assert num_preemptions(llm) > 0
    with retaining(model, enable_prefix_caching=True) as llm:
        with checked_promises(llm) as taken:
            first = one_by_one(llm, prompts, 40)
            repeat = one_by_one(llm, prompts, 40)
            together = generate(llm, prompts, 40)
        assert sum(taken) > 100
    assert bits(first) == bits(repeat) == bits(together) == alone
    assert sum(answer.num_cached for answer in repeat) > sum(a.num_cached for a in first) > 0
    # A prefix far longer than what is kept was found: its first blocks and its window were there.
    assert max(answer.num_cached for answer in repeat) > 5 * BLOCK_SIZE


def check_ngram_speculation(model: str) -> None:
    prompts = [(prompt[:20] * 10)[:160] for prompt in varied_prompts(6, VOCAB_SIZE, longest=40)]
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    with retaining(model) as llm:
        plain = one_by_one(llm, prompts, 60)
    with retaining(model, speculative_config=speculation, num_gpu_blocks_override=17) as llm:
        drafted = generate(llm, prompts, 60)
        metrics = {m.name: m for m in llm.get_metrics()}
        assert metrics["vllm:spec_decode_num_draft_tokens"].value > 0
    assert bits(plain) == bits(drafted)


def test_ngram_speculation_does_not_matter(model_folder):
    """In a process of its own, as in test_features."""
    model = make_model("llama", model_folder)
    code = f"from engine.test_retention import check_ngram_speculation as f; f({model!r})"
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tests, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_prefix_without_its_first_block_is_not_used(model_folder):
    """Evicting the first block of a cached prefix leaves nothing to find."""
    model = make_model("llama", model_folder)
    (prompt,) = varied_prompts(1, VOCAB_SIZE, longest=400, shortest=400)
    with retaining(model, enable_prefix_caching=True) as llm:
        pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        with counted_blocks(llm):
            answers = generate(llm, [prompt], 8)
        answers += generate(llm, [prompt], 8)
        assert answers[1].num_cached >= 384 - BLOCK_SIZE
        # vLLM hands out blocks from 1 on, so the first request's first block is number 1.
        pool.evict_blocks({1})
        answers += generate(llm, [prompt], 8)
        assert answers[2].num_cached == 0
    assert len(set(bits(answers))) == 1


def test_short_requests_are_as_without(model_folder):
    """What fits is attended as ever; only the split of the first tokens' sums differs."""
    model = make_model("llama", model_folder)
    prompts = varied_prompts(8, VOCAB_SIZE, longest=60)
    with retaining(model) as llm:
        kept = one_by_one(llm, prompts, 4)
    with engine(model, "fibquant_3bit", **LONG) as llm:
        plain = one_by_one(llm, prompts, 4)
    assert [a.tokens for a in kept] == [a.tokens for a in plain]
    for a, b in zip(kept, plain, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


# ---- the method ----------------------------------------------------------------------------------


def truth(
    model: str, tokens: list[int], first: int, recent: int, *, turn_back: bool = False
) -> torch.Tensor:
    """StreamingLLM in transformers on decoded keys and values, as `prompt_logprobs`."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    codec = KVCodec.from_preset(PRESETS["fibquant_3bit"], 64)

    def attend(module, query, key, value, attention_mask, scaling, **_):
        group = query.shape[1] // key.shape[1]
        records = codec.encode_records(key[0].transpose(0, 1), value[0].transpose(0, 1))
        key, value = (
            x.transpose(0, 1)[None].repeat_interleave(group, 1).double()
            for x in codec.decode_records(records)
        )
        query, head_dim = query.double(), query.shape[-1]
        position = torch.arange(query.shape[2])
        gone = (position + 1 - first - recent).clamp_min(0)
        theta = module.config.rope_parameters["rope_theta"]
        angle = gone[:, None] * theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
        a, b = query.chunk(2, -1)
        turned = torch.cat(
            (a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()), -1
        )
        scores = query @ key.transpose(-1, -2)
        if turn_back:
            scores[..., :first] = (turned @ key.transpose(-1, -2))[..., :first]
        distance = position[:, None] - position
        seen = (distance >= 0) & ((distance < recent) | (position < first))
        weights = (scores * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ value).float().transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("fibquant_test_truth", attend)
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="fibquant_test_truth"
    )
    with torch.no_grad():
        logits = network(torch.tensor([tokens])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_the_method_is_streamingllm(model_folder):
    """Equal to the method written out in PyTorch on the same codes, and to no near relative.

    The median, for a key that rounds to another codeword in one of the two moves a few tokens.
    """
    model = make_model("llama", model_folder)
    (tokens,) = varied_prompts(1, VOCAB_SIZE, longest=600, shortest=600, seed=3)
    with retaining(model) as llm:
        got = prompt_logprobs(llm, tokens)

    def error(*args, **options) -> float:
        return float((got - truth(model, tokens, *args, **options))[100:].abs().median())

    assert error(4, 70, turn_back=True) < 1e-3
    assert error(4, 70) > 0.05, "true positions"
    assert error(0, 74) > 0.05, "a window alone"
    assert error(4, 69, turn_back=True) > 0.05, "one token fewer"
    assert error(3, 70, turn_back=True) > 0.05, "one first token fewer"
    assert error(0, 600) > 0.05, "all tokens"


@pytest.mark.slow
def test_a_real_model_ten_times_longer_than_what_is_kept():
    """Perplexity stays at that of a fresh prompt of the kept tokens alone; a window's does not."""
    from pydoc_data import topics

    from transformers import AutoTokenizer

    from vllm_fibquant.demo_model import ensure_demo_model

    model = str(ensure_demo_model())
    kept, first, stride, length = 256, 4, 64, 2560
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    tokens = AutoTokenizer.from_pretrained(model).encode(text[: 8 * length])[:length]
    settings = {"max_model_len": length + 8, "max_num_batched_tokens": kept}
    ends = range(kept + stride, length, 2 * stride)

    def mean_perplexity(logprobs: list[torch.Tensor]) -> float:
        return float((-torch.cat(logprobs).mean()).exp())

    fresh = []
    with engine(model, "auto", kv_cache_memory_bytes=256 << 20, **settings) as llm:
        for end in ends:
            prompt = tokens[:first] + tokens[end - kept + first : end]
            fresh.append(prompt_logprobs(llm, prompt)[-stride:])

    def perplexity(first: int) -> float:
        """Of the same tokens, in one request."""
        retain = {"first": first, "recent": kept - first}
        with (
            retaining(model, "fibquant_4bit", retain, **settings) as llm,
            counted_blocks(llm) as most,
        ):
            got = prompt_logprobs(llm, tokens)
        assert most[0] <= 1 + -(-2 * kept // BLOCK_SIZE) + 1
        # got[i] is the token i + 1's.
        return mean_perplexity([got[end - 1 - stride : end - 1] for end in ends])

    expected = mean_perplexity(fresh)
    kept_first, window_alone = perplexity(first), perplexity(0)
    print(f"\nfresh {expected:.2f}, kept {kept_first:.2f}, window alone {window_alone:.2f}")
    assert kept_first < 1.1 * expected
    assert window_alone > 1.3 * expected


@pytest.mark.slow
def test_two_ranks_and_processes_of_their_own(model_folder):
    """Specs reach the engine's process by pickle; each rank turns its own heads' queries."""
    model = make_model("llama", model_folder)
    prompts = varied_prompts(8, VOCAB_SIZE, longest=480, shortest=300)
    with retaining(model, "fibquant_2bit", max_model_len=512) as llm:
        expected = one_by_one(llm, prompts, 6)
    flags = [
        "--additional-config", json.dumps({"fibquant": {"retain": RETAIN}}),
        "--max-num-batched-tokens", str(CHUNK), "--enforce-eager",
    ]  # fmt: skip
    with server(model, *flags) as url:
        assert bits(ask_all(url, prompts)) == bits(expected)
    with server(model, *flags, "--tensor-parallel-size", "2", threads="0|1") as url:
        other_tokens, _, largest = largest_difference(expected, ask_all(url, prompts))
    assert other_tokens == 0
    assert largest < 0.05
