# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compile to machine code for NVIDIA GPUs, without one.

The interpreter accepts programs the compiler refuses. The launchers run as they are, with launches
recorded in the place of being made; each recorded kernel is then compiled ahead of time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from vllm_fibquant.codec.codec import KVCodec  # noqa: E402
from vllm_fibquant.codec.config import PRESETS  # noqa: E402
from vllm_fibquant.kernels import attention, encode  # noqa: E402
from vllm_fibquant.ops import Attend, Batch, Fresh, Pages, gpu  # noqa: E402

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
MAX_SHARED = 99 << 10
"""Bytes of shared memory a CTA may have on the smallest of sm_80, 86, 89, 90, 100 and 120."""


MAX_STACK = {"_encode": 512, "attend_raw": 64, "_attend_split": 64}
"""Bytes of stack a thread may spill to, by kernel: none where it is not named. CUDA reserves it for
every thread that a device can hold."""


def stack_bytes(cubin: bytes) -> int:
    """Bytes of a thread's stack, as the machine code says."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"STACK:(\d+)", shown))


def type_of(x) -> str:
    if torch.is_tensor(x):
        return TYPES[x.dtype]
    return "fp32" if isinstance(x, float) else "i32"


def launches(name: str, head_dim: int, dtype: torch.dtype, prefill: bool, monkeypatch) -> list:
    """(kernel, arguments by name, options) of every launch of an encode and an attention call."""
    recorded = []

    def record(self, *args, grid, warmup, **kwargs):
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        recorded.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options))

    monkeypatch.setattr(JITFunction, "run", record)
    codec = KVCodec.from_preset(PRESETS[name], head_dim)
    cache = torch.zeros(4, 2, 16, codec.layout.record_bytes, dtype=torch.uint8)
    num_tokens = 40 if prefill else 3
    key = torch.zeros(num_tokens, 2, head_dim, dtype=dtype)
    query = torch.zeros(num_tokens, 8, head_dim, dtype=dtype)
    integers = torch.zeros(4, dtype=torch.int32)
    pages = Pages(cache, codec, None, gpu.TRITON)
    encode.encode_kv(key, key, torch.zeros(3).long(), pages)
    attention.paged_attention(
        query, query.clone(), pages,
        Batch(integers, integers[:3], integers.view(1, 4).expand(3, 4)),
        Attend(0.1, window=5, soft_cap=3.0, sinks=torch.zeros(8)), Fresh(key, key), num_splits=2,
    )  # fmt: skip
    return recorded


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "head_dim", "dtype", "capability"),
    [
        ("fibquant_k5v3", 128, torch.bfloat16, 90),
        pytest.param("fibquant_2bit", 128, torch.float16, 80, marks=pytest.mark.slow),
        pytest.param("fibquant_4bit", 64, torch.bfloat16, 100, marks=pytest.mark.slow),
        pytest.param("fibquant_1bit", 64, torch.float32, 80, marks=pytest.mark.slow),
        pytest.param("fibquant_4bit", 256, torch.bfloat16, 90, marks=pytest.mark.slow),
        pytest.param("fibquant_3bit", 80, torch.bfloat16, 120, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kernels_compile(name, head_dim, dtype, capability, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        recorded = launches(name, head_dim, dtype, False, patch)
        recorded += launches(name, head_dim, dtype, True, patch)[1:]
    assert len(recorded) == 9
    stacks: dict[str, int] = {}
    for kernel, arguments, options in recorded:
        constants = {p.name for p in kernel.params if p.is_constexpr}
        source = ASTSource(
            kernel,
            {n: "constexpr" if n in constants else type_of(x) for n, x in arguments.items()},
            {n: arguments[n] for n in constants},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert len(compiled.asm["cubin"]) > 0
        name = kernel.fn.__name__
        stacks[name] = max(stacks.get(name, 0), stack_bytes(compiled.asm["cubin"]))
        assert compiled.metadata.shared <= MAX_SHARED, f"{kernel}: {compiled.metadata.shared}"
    if head_dim == 128 and capability == 90:  # the others' stacks have not been looked at
        assert all(n <= MAX_STACK.get(name, 0) for name, n in stacks.items()), str(stacks)
