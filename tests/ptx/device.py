# SPDX-License-Identifier: Apache-2.0
"""A device for tests: launches of the emulated library run as PTX.

The emulated library's host code chooses kernels, grids and arguments, as on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import itertools
import re
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tests.emulated import ROOT
from tests.ptx import machine
from tests.ptx.parse import Fault, Kernel, kernel_names, kernel_text, parse
from vllm_fibquant.ops.cuda import Library

FAILED = -100
_EXECUTOR = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int), ctypes.c_void_p, ctypes.c_int
)


def has_nvcc() -> bool:
    return shutil.which("nvcc") is not None


@functools.cache
def compile_ptx(source: Path, arch: str, *flags: str) -> str:
    """What nvcc makes of a file for an architecture such as "90": text, kept in build/ptx."""
    folder = ROOT / "build" / "ptx"
    folder.mkdir(parents=True, exist_ok=True)
    headers = (path for at in (".", "cuda") for path in (ROOT / "csrc" / at).glob("*.h"))
    made_of = [source, *sorted(headers)]
    digest = hashlib.sha256(" ".join([arch, *flags]).encode())
    for path in made_of:
        digest.update(path.read_bytes())
    target = folder / f"{source.stem}-{arch}-{digest.hexdigest()[:16]}.ptx"
    if not target.exists():
        command = ["nvcc", "-ptx", "-O3", "-std=c++17", f"-arch=compute_{arch}", *flags]
        command += ["-I", str(ROOT / "csrc"), str(source), "-o", str(target) + ".new"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        Path(str(target) + ".new").replace(target)
    return target.read_text()


@dataclass
class Device:
    """What ran, and what is to be changed.

    Attributes:
        arch: the architecture that PTX is made for.
        change: of a kernel's PTX before it runs, for mutations.
        allow_unwritten: whether kernels may read shared memory that they have not written.
        ran: opcodes by kernel, each name without template arguments.
        error: the first fault.
    """

    arch: str
    change: Callable[[str], str] = str
    allow_unwritten: bool = False
    ran: dict[str, set[str]] = field(default_factory=dict)
    error: BaseException | None = None

    def run(self, signature: str, sizes: list[int], args: bytes) -> None:
        match = re.search(r"kKernel = \(?&?(?:fq::)?(\w+)(?:<([\d, ]+)>)?", signature)
        assert match, signature
        mangled, head_dim = f"{len(match[1])}{match[1]}", None
        if match[2]:
            numbers = re.findall(r"\d+", match[2])
            mangled, head_dim = mangled + "I" + "".join(f"Li{n}E" for n in numbers), numbers[0]
        kernel = _kernel(self.arch, head_dim, mangled + "E", self.change)
        x, y, z, threads, shared_bytes = sizes
        ran = machine.run(
            kernel, (x, y, z), threads, shared_bytes, args, regions_of(args), self.allow_unwritten
        )
        self.ran.setdefault(match[1], set()).update(ran)


@functools.lru_cache(32)
def _kernel(arch: str, head_dim: str | None, mangled: str, change: Callable[[str], str]) -> Kernel:
    """A kernel of one head_dim, of kernels.cu, or one for all, of library.cu."""
    source, flags = (
        ("kernels.cu", [f"-DFQ_HEAD_DIM={head_dim}"]) if head_dim else ("library.cu", [])
    )
    text = compile_ptx(ROOT / "csrc" / "cuda" / source, arch, *flags)
    name = next(name for name in kernel_names(text) if mangled in name)
    return parse(change(kernel_text(text, name)))


@contextlib.contextmanager
def running(library: Library, arch: str = "90", **options) -> Iterator[Device]:
    """While it lasts, launches of the emulated `library` run as PTX.

    Raises:
        Fault: at the end, the first fault of a launch.
    """
    device = Device(arch, **options)

    def execute(signature, sizes, args, count) -> int:
        try:
            device.run(signature.decode(), list(sizes[:5]), ctypes.string_at(args, count))
        except BaseException as error:  # no exception may pass through C
            device.error = device.error or error
            return FAILED
        return 0

    executor = _EXECUTOR(execute)
    library.lib.fq_emulator_executor(executor)
    try:
        yield device
    except BaseException:
        if device.error is None:
            raise
    finally:
        library.lib.fq_emulator_executor(None)
    if device.error is not None:
        raise device.error


def _new_tensors() -> Iterator[torch.Tensor]:
    """Those that are not frozen."""
    for x in gc.get_objects():
        if type(x) in (torch.Tensor, torch.nn.Parameter):  # fake ones have no storage
            yield x


@contextlib.contextmanager
def tensors_before() -> Iterator[None]:
    """While it lasts, a launch looks for tensors among those there are now and all new objects,
    rather than in all that is imported, which takes longer than most kernels."""
    gc.collect()
    _BEFORE[:] = map(weakref.ref, _new_tensors())
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        _BEFORE.clear()


_BEFORE: list[weakref.ref[torch.Tensor]] = []


def regions_of(args: bytes) -> list[tuple[int, int]]:
    """(address, bytes) of the storages of live CPU tensors that pointers in `args` lead into."""
    words = np.unique(np.frombuffer(args, np.uint64))
    found = set()
    before = (x for ref in _BEFORE if (x := ref()) is not None)
    for tensor in itertools.chain(before, _new_tensors()):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            continue
        storage = tensor.untyped_storage()
        begin, size = storage.data_ptr(), storage.nbytes()
        at = np.searchsorted(words, np.uint64(begin))
        if at < len(words) and int(words[at]) < begin + size:
            found.add((begin, size))
    return sorted(found)


__all__ = [
    "Device",
    "Fault",
    "compile_ptx",
    "has_nvcc",
    "regions_of",
    "running",
    "tensors_before",
]
