# SPDX-License-Identifier: Apache-2.0
"""Requests per second of the server when memory for the cache is short, by format.

Documents of 1,000 to 3,000 tokens are asked about again and again, a new question each time: what
assistants over a set of documents, and chats of many turns, do. All formats get the same memory,
which holds all documents only when they are compressed. Where a document is still cached a request
computes its question alone, elsewhere the whole document.

The client is vLLM's own (`vllm bench serve`, dataset "custom"). All servers run at once, are asked
in turn and are idle otherwise, so that whatever else the machine does hits all of them; other work
disturbs the CPU time of a request least. The documents are read once before anything is measured.

    python -m benchmarks.bench_load --out docs/results/load.jsonl

On a CPU without AVX-512 vLLM is run in float32, whose cache takes 32 bits per value; `auto` is then
given twice the memory, as many tokens as it would hold in 16 bits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import add_out, append, model_or_demo
from benchmarks.served import NAME, Served, serving

DOCUMENT_TOKENS = (1024, 1280, 1536, 1792, 2048, 3072)
OUTPUT_TOKENS = 32
FORMATS = {
    "auto": (),
    "fibquant": (),
    "fibquant_2bit": ("--additional-config", '{"fibquant": {"mode": "quality"}}'),
}
CLIENT = """
import argparse
from vllm.benchmarks import serve
parser = argparse.ArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args())
"""
HEADING = """
| concurrency | format | requests / s | vs auto | CPU s / request | TTFT p50, p95 (s) \
| TPOT p50, p95 (ms) | found in cache | preemptions |
|---:|---|---:|---:|---:|---:|---:|---:|---:|"""
COUNTERS = ("prefix_cache_hits", "prefix_cache_queries", "num_preemptions")


def documents_of(model: str, sizes: list[int]) -> list[str]:
    """Texts of `sizes` tokens, up to what cutting a text between two tokens changes."""
    import pydoc_data.topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    topics = sorted(pydoc_data.topics.topics.values(), key=len)
    tokens = tokenizer("\n".join(topics[::-1])[: 6 * sum(sizes)]).input_ids
    documents, begin = [], 0
    for count in sizes:
        documents.append(tokenizer.decode(tokens[begin : begin + count]))
        begin += count
    return documents


def requests_of(documents: list[str], per_document: int, seed: int) -> list[dict[str, str]]:
    """Each document with `per_document` new questions, in random order."""
    draw = random.Random(seed)
    requests = []
    for document in documents:
        for _ in range(per_document):
            words = " ".join(draw.choice(document.split()) for _ in range(24))
            question = f"\n\nQuestion {draw.randrange(10**6)}: what is said about {words}?"
            requests.append({"prompt": document + question})
    draw.shuffle(requests)
    return requests


def run_client(
    server: Served, model: str, requests: list[dict[str, str]], concurrency: int
) -> dict[str, Any]:
    """What vLLM's client reports, and what the server's counters went up by."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "requests.jsonl"
        dataset.write_text("".join(json.dumps(request) + "\n" for request in requests))
        before, busy = server.metrics(), server.cpu_seconds()
        command = [
            sys.executable, "-c", CLIENT, "--backend", "openai", "--base-url", server.url,
            "--model", NAME, "--tokenizer", model, "--dataset-name", "custom",
            "--dataset-path", str(dataset), "--num-prompts", str(len(requests)),
            "--custom-output-len", str(OUTPUT_TOKENS),
            "--skip-chat-template", "--disable-shuffle", "--ignore-eos", "--temperature", "0",
            "--max-concurrency", str(concurrency), "--percentile-metrics", "ttft,tpot,e2el",
            "--metric-percentiles", "50,95", "--save-result", "--result-dir", folder,
            "--result-filename", "result.json", "--disable-tqdm",
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True)
        result = Path(folder) / "result.json"
        if not result.exists():
            sys.exit(f"bench_load: the client failed:\n{run.stdout[-2000:]}\n{run.stderr[-3000:]}")
        report = json.loads(result.read_text())
        tokens = report["total_output_tokens"]
        if report["completed"] != len(requests) or tokens != len(requests) * OUTPUT_TOKENS:
            sys.exit(f"bench_load: must get {len(requests)} answers of {OUTPUT_TOKENS} tokens, "
                     f"got {report['completed']} of {tokens} in all")  # fmt: skip
        after, busy = server.metrics(), server.cpu_seconds() - busy
    counted = {name: after[f"vllm:{name}"] - before[f"vllm:{name}"] for name in COUNTERS}
    names = [f"{p}_{m}_ms" for m in ("ttft", "tpot") for p in ("p50", "p95")]
    return {
        "completed": report["completed"],
        "seconds": report["duration"],
        "requests_per_s": report["request_throughput"],
        "cpu_s_per_request": busy / report["completed"],
        **{name: report[name] for name in names},
        "preemptions": int(counted["num_preemptions"]),
        "hit_rate": counted["prefix_cache_hits"] / counted["prefix_cache_queries"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of a model; the demo model when left out")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--cache-mib", type=int, default=106,
                        help="memory of the cache, for 16 bits per value")  # fmt: skip
    parser.add_argument("--documents", type=int, nargs="+", default=list(DOCUMENT_TOKENS),
                        help="tokens of each document")  # fmt: skip
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--per-document", type=int, default=3)
    parser.add_argument("--first-port", type=int, default=18210)
    add_out(parser)
    args = parser.parse_args()
    model = model_or_demo(args.model)
    documents = documents_of(model, args.documents)

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers: dict[str, Served] = {}
        for number, name in enumerate(args.formats):
            doubled = 2 if name == "auto" and args.dtype == "float32" else 1
            cache = args.cache_mib * doubled << 20
            flags = ["--kv-cache-dtype", name, *FORMATS[name], "--dtype", args.dtype]
            flags += ["--max-model-len", str(max(args.documents) + 512), "--max-num-seqs", "16"]
            flags += ["--enforce-eager", "--kv-cache-memory-bytes", str(cache)]
            servers[name] = stack.enter_context(
                serving(model, *flags, log_path=folder / name, port=args.first_port + number)
            )
        tokens = {name: server.cache_tokens() for name, server in servers.items()}
        print(f"documents: {sum(args.documents)} tokens; the cache holds {tokens}", flush=True)
        for server in servers.values():
            run_client(server, model, requests_of(documents, 1, seed=0), 1)
        print(HEADING, flush=True)
        for concurrency in args.concurrency:
            requests = requests_of(documents, args.per_document, seed=concurrency)
            rates: dict[str, float] = {}
            for name, server in servers.items():
                row = run_client(server, model, requests, concurrency)
                rates[name] = row["requests_per_s"]
                ratio = rates[name] / rates[args.formats[0]]
                append(args.out, bench="load", format=name, concurrency=concurrency,
                       cache_mib=args.cache_mib, documents=args.documents, ratio=ratio,
                       model_dtype=args.dtype, cache_tokens=tokens[name], **row)  # fmt: skip
                print(
                    f"| {concurrency} | {name} | {rates[name]:.3f} | {ratio:.2f}x "
                    f"| {row['cpu_s_per_request']:.1f} "
                    f"| {row['p50_ttft_ms'] / 1e3:.2f}, {row['p95_ttft_ms'] / 1e3:.2f} "
                    f"| {row['p50_tpot_ms']:.0f}, {row['p95_tpot_ms']:.0f} "
                    f"| {row['hit_rate']:.0%} | {row['preemptions']} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
