# SPDX-License-Identifier: Apache-2.0
"""Perplexity and next-token agreement of every preset, read through the engine's cache.

The text is the reference documentation that ships with Python (pydoc_data.topics): real prose,
present wherever this runs. Each chunk is scored by vLLM's own prompt log-probabilities. In prefill
mode `codes` every scored token attended to codes that were written, paged and read back, its own
included; the chunk is prefilled in several steps, so that cached context is read as well.

    python -m benchmarks.bench_quality --out quality.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common import add_out, append, model_or_demo, run_apart
from vllm_fibquant.config import PRESETS
from vllm_fibquant.layout import preset_layout
from vllm_fibquant.options import parse_options

GAIN_RULES = ("norm", "preserve", "mse", "unbiased")


def formats(ablation: bool) -> list[tuple[str, str, dict[str, Any]]]:
    """(label, --kv-cache-dtype, fibquant options) of all that is measured; the truth first."""
    rows: list[tuple[str, str, dict[str, Any]]] = [("auto", "auto", {})]
    published = {"key": {"gain": "norm"}, "value": {"gain": "norm"}}
    for name in PRESETS:
        if name == "fibquant":
            continue
        rows.append((name, name, {}))
        if name.endswith("bit"):
            rows.append((f"{name}, published gains", name, published))
        if ablation:
            for side in ("key", "value"):
                rows += [
                    (f"{name}, {side} {gain}", name, {side: {"gain": gain}}) for gain in GAIN_RULES
                ]
    return rows


def score(args: argparse.Namespace) -> None:
    """Scores one format in this process; prints one JSON line."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    from pydoc_data import topics

    from vllm import LLM, SamplingParams

    _, dtype, options = json.loads(args.score)
    llm = LLM(
        args.model, dtype="float32", enforce_eager=True, kv_cache_dtype=dtype,
        max_model_len=args.length + 8, max_num_batched_tokens=args.chunk, max_num_seqs=1,
        kv_cache_memory_bytes=256 << 20, enable_prefix_caching=False,
        additional_config={"fibquant": options} if options else {},
    )  # fmt: skip
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    tokens = llm.get_tokenizer().encode(text[: 8 * args.length * args.chunks])
    logprobs, top1 = [], []
    for chunk in range(args.chunks):
        prompt = tokens[chunk * args.length : (chunk + 1) * args.length]
        assert len(prompt) == args.length, "the text is too short for this many chunks"
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        steps = output.prompt_logprobs[1:]
        logprobs.append([s[t].logprob for s, t in zip(steps, prompt[1:], strict=True)])
        top1.append([max(s, key=lambda token: s[token].logprob) for s in steps])
    print("RESULT " + json.dumps({"logprobs": logprobs, "top1": top1}))


def summarise(
    label: str, dtype: str, options: dict, result: dict, truth: dict, head_dim: int
) -> dict[str, Any]:
    """Perplexity with its standard error over chunks, its ratio to the truth's, and agreement."""
    per_chunk = [-statistics.fmean(c) for c in result["logprobs"]]
    ratios = [-statistics.fmean(c) for c in truth["logprobs"]]
    loss = [a - b for a, b in zip(per_chunk, ratios, strict=True)]
    same = [
        a == b
        for x, y in zip(result["top1"], truth["top1"], strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    rate = 16.0
    if dtype != "auto":
        preset = parse_options(dtype, {"fibquant": options}).preset
        rate = preset_layout(preset, head_dim).effective_rate
    error = statistics.stdev(loss) / math.sqrt(len(loss)) if len(loss) > 1 else 0.0
    return {
        "format": label,
        "effective_rate": rate,
        "perplexity": math.exp(statistics.fmean(per_chunk)),
        "relative": math.exp(statistics.fmean(loss)),
        "relative_error": math.exp(statistics.fmean(loss)) * error,
        "agreement": statistics.fmean(same),
        "tokens": len(same),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of a model; the demo model when left out")
    parser.add_argument("--length", type=int, default=1024, help="tokens per chunk")
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=256, help="tokens prefilled in one step")
    parser.add_argument("--only", nargs="+", help="labels to measure beside auto")
    parser.add_argument("--custom", nargs=3, action="append", default=[],
                        metavar=("LABEL", "PRESET", "OPTIONS"),
                        help="also a preset with these fibquant options (JSON)")  # fmt: skip
    parser.add_argument("--ablation", action="store_true", help="every gain rule on either side")
    add_out(parser)
    parser.add_argument("--score", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = model_or_demo(args.model)
    if args.score:
        score(args)
        return

    config = json.loads((Path(args.model) / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rows = [r for r in formats(args.ablation) if not args.only or r[0] in ("auto", *args.only)]
    rows += [(label, preset, json.loads(options)) for label, preset, options in args.custom]
    print("| format | bits / value | perplexity | relative to auto | same next token |")
    print("|---|---|---|---|---|")
    truth: dict = {}
    for label, dtype, options in tqdm(rows, disable=None, leave=False):
        arguments = ["--model", args.model, "--length", str(args.length)]
        arguments += ["--chunks", str(args.chunks), "--chunk", str(args.chunk)]
        arguments += ["--score", json.dumps([label, dtype, options])]
        result = run_apart("bench_quality", arguments, label)
        truth = truth or result
        row = summarise(label, dtype, options, result, truth, head_dim)
        tqdm.write("| {format} | {effective_rate:.2f} | {perplexity:.2f} | {relative:.3f} ± "
                   "{relative_error:.3f} | {agreement:.1%} |".format(**row))  # fmt: skip
        append(args.out, bench="quality", model=Path(args.model).name, **row)


if __name__ == "__main__":
    main()
