# SPDX-License-Identifier: Apache-2.0
"""Machine instructions of decode attention per cached token and KV head, ours beside vLLM's own.

A child process executes one call under ptrace, instruction by instruction, after contexts of two
lengths; the difference is what the tokens between cost, without what a call costs. The numbers
depend on the instruction set and the compiler, and not on what else the machine does.

    python -m benchmarks.bench_instructions
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
from collections.abc import Callable

import torch
from tqdm import tqdm

from benchmarks.bench_attention import AS_SERVED, FP8_DTYPES, PRESET_NAMES, Case, options_of
from benchmarks.common import add_out, append, cpu_name
from vllm_fibquant import ops
from vllm_fibquant.ops import cpu_library

SHAPES = ((64, 1, 3), (128, 1, 4), (128, 1, 1), (128, 1, 8))  # head_dim, num_kv_heads, group_size
CONTEXTS = 512, 1024
_TRACEME, _SINGLESTEP = 0, 9  # <sys/ptrace.h>
_REFUSED = 113  # how a copy ends that may not be traced


def count_instructions(call: Callable[[], object]) -> int:
    """Instructions that a copy of this process executes in `call`, Python's included.

    Raises:
        OSError: the system does not let a process trace its child.
        RuntimeError: the call ended the copy.
    """
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long] * 4
    ptrace.restype = ctypes.c_long
    if (child := os.fork()) == 0:
        if ptrace(_TRACEME, 0, 0, 0) != 0:
            os._exit(_REFUSED)
        os.kill(os.getpid(), signal.SIGSTOP)
        call()
        os.kill(os.getpid(), signal.SIGSTOP)
    count, status = -1, os.waitpid(child, 0)[1]
    while os.WIFSTOPPED(status) and not (count >= 0 and os.WSTOPSIG(status) == signal.SIGSTOP):
        ptrace(_SINGLESTEP, child, 0, 0)
        status, count = os.waitpid(child, 0)[1], count + 1
    if not os.WIFSTOPPED(status):
        if os.waitstatus_to_exitcode(status) == _REFUSED:
            raise OSError("count_instructions: the system lets no process trace its child")
        raise RuntimeError(f"count_instructions: the call must return, got wait status {status}")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return count


def formats(shape: tuple[int, int, int], context: int, presets: list[str]) -> dict[str, int]:
    """Instructions of one call of each format."""
    case = Case(shape, context, 1, torch.bfloat16)
    case.num_layers = 1
    case.add_vllm(torch.bfloat16)
    for cache_dtype in FP8_DTYPES:
        if torch.cpu._is_avx512_supported():  # vLLM refuses it without
            case.add_vllm(torch.bfloat16, cache_dtype)
    for preset in presets:
        case.add_preset(preset)
    served = options_of(case, "fibquant_3bit")[AS_SERVED]
    case.add_preset("fibquant_3bit", f"fibquant_3bit {AS_SERVED}", **served)
    found = {}
    for name, (_, run) in case.formats.items():
        run(0)
        found[name] = count_instructions(lambda run=run: run(0))  # type: ignore[misc]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", default=list(PRESET_NAMES))
    parser.add_argument("--instruction-set", help="avx2, say; default: this CPU's best")
    add_out(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu_library.select_isa(args.instruction_set)
    print(f"kernel {ops.kernel_name()} on {cpu_name()}")
    print("| head_dim, queries of a KV head | format | instructions per token |\n|---|---|---|")
    for shape in tqdm(SHAPES, disable=None, leave=False):
        short, long = (formats(shape, context, args.presets) for context in CONTEXTS)
        for name, count in long.items():
            per_token = (count - short[name]) / (CONTEXTS[1] - CONTEXTS[0])
            tqdm.write(f"| {shape[0]}, {shape[2]} | {name} | {per_token:.1f} |")
            append(
                args.out, bench="instructions", head_dim=shape[0], group_size=shape[2], format=name,
                per_token=per_token, kernel=ops.kernel_name(), cpu=cpu_name(),
            )  # fmt: skip


if __name__ == "__main__":
    main()
