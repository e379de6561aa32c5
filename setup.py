# SPDX-License-Identifier: Apache-2.0
"""Builds the CPU library: a plain C-ABI shared object, loaded with ctypes.

It includes no Python and no torch header, so one build serves every Python version and the
wheel is tagged py3-none-<platform>. The kernels are compiled once per instruction set; the
library picks one when it is loaded. Everything else about the package is in pyproject.toml.

CXX and CXXFLAGS are respected.

The CUDA library is apart, so that it cannot break an install: `python setup.py build_cuda` needs
nvcc (CUDACXX, or nvcc on the PATH) and compiles for FIBQUANT_CUDA_ARCHS. With FIBQUANT_CUDA=1 every
build does so, and a wheel holds it. It links neither torch nor CUDA's shared libraries. With
--emulated the same kernels are compiled for the emulator of csrc/cuda/emulate.h by the C++
compiler, for tests.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))
from vllm_fibquant.headers import header_digest  # noqa: E402

LIBRARY = "libfibquant_cpu.so"
X86 = platform.machine().lower() in ("x86_64", "amd64")

COMPILE_FLAGS = shlex.split(
    "-O3 -std=c++17 -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra "
    # Results must not depend on where the compiler chose to fuse a multiply and an add.
    "-ffp-contract=off -fno-math-errno -fno-trapping-math"
)
ISA_FLAGS: dict[str, list[str]] = {"portable": []}
if X86:
    ISA_FLAGS["avx2"] = shlex.split("-mavx2 -mfma -mf16c -mbmi -mbmi2")
    ISA_FLAGS["avx512"] = shlex.split(
        "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mbmi -mbmi2"
    )
    # GCC 12 warns about its own AVX-512 headers.
    ISA_FLAGS["avx512"].append("-Wno-maybe-uninitialized")
    ISA_FLAGS["avx512_vnni"] = [*ISA_FLAGS["avx512"], "-mavx512vbmi", "-mavx512vnni"]
    ISA_FLAGS["avx512_vnni"].append("-Wno-uninitialized")


def compile_units() -> list[tuple[str, str, list[str]]]:
    """(source, object name, extra flags) of every translation unit."""
    units = [
        ("csrc/cpu/kernels.cpp", f"kernels_{isa}.o", [f"-DFQ_ISA={isa}", *flags])
        for isa, flags in ISA_FLAGS.items()
    ]
    return [*units, ("csrc/cpu/library.cpp", "library.o", [])]


def abi_flag(library: str) -> str:
    """For every unit, so that none is left that was compiled with other headers."""
    return f"-DFQ_ABI={header_digest(library, ROOT / 'csrc')}"


class BuildLibrary(build_ext):
    """Compiles with the C++ compiler directly: one source becomes several objects."""

    def run(self) -> None:
        super().run()
        if os.environ.get("FIBQUANT_CUDA") == "1":
            self.run_command("build_cuda")
            if not self.inplace:
                target = Path(self.build_lib) / "vllm_fibquant" / "lib" / CUDA_LIBRARY
                self.copy_file(str(ROOT / "vllm_fibquant" / "lib" / CUDA_LIBRARY), str(target))

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def copy_extensions_to_source(self) -> None:
        (ROOT / "vllm_fibquant" / "lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        # Next to setup.py, not in pip's temporary directory: repeated installs stay incremental.
        objects_dir = ROOT / "build" / f"cpu-{platform.machine()}"
        objects_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)

        compiler = shlex.split(os.environ.get("CXX", "g++"))
        user_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        headers = [ROOT / path for path in ext.depends]

        def compile_unit(unit: tuple[str, str, list[str]]) -> Path:
            source, object_name, flags = unit
            output = objects_dir / object_name
            command = [*compiler, *COMPILE_FLAGS, *flags, abi_flag("cpu")]
            command += ["-I", str(ROOT / "csrc"), *user_flags]
            command += ["-c", str(ROOT / source), "-o", str(output)]
            run_if_stale(command, output, [ROOT / source, *headers], self.force)
            return output

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_unit, compile_units()))

        built = objects_dir / LIBRARY
        link = [*compiler, "-shared", "-fopenmp", *map(str, objects), "-o", str(built), *user_flags]
        run_if_stale(link, built, objects, self.force)
        # copy_file unlinks the old file first: a running server keeps what it has mapped.
        self.copy_file(str(built), str(target))


def run_if_stale(command: list[str], output: Path, inputs: list[Path], force: bool) -> None:
    """Run `command` unless `output` is newer than `inputs` and was made by the same command."""
    record = output.with_suffix(output.suffix + ".command")
    text = shlex.join(command)
    if (
        not force
        and output.exists()
        and record.exists()
        and record.read_text() == text
        and all(path.stat().st_mtime <= output.stat().st_mtime for path in inputs)
    ):
        return
    print(text, flush=True)
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        sys.exit(f"setup.py: no compiler: {command[0]} not found; install it, or set CXX (CUDACXX)")
    except subprocess.CalledProcessError as error:
        sys.exit(f"setup.py: exit status {error.returncode} from: {text}")
    record.write_text(text)


CUDA_LIBRARY = "libfibquant_cuda.so"
EMULATED_LIBRARY = "libfibquant_cuda_emulated.so"  # in build/
# PTX of the oldest serves devices that have no machine code here.
CUDA_ARCHS = "80 86 89 90 100 120"
CUDA_FLAGS = shlex.split("-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden")
EMULATED_FLAGS = shlex.split(
    "-O1 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off"
)


def cuda_head_dims() -> list[str]:
    """The head dims of csrc/cuda/supported.h: one object file each."""
    for line in (ROOT / "csrc/cuda/supported.h").read_text().splitlines():
        if line.startswith("#define FQ_HEAD_DIMS"):
            return re.findall(r"X\((\d+),", line)
    sys.exit("setup.py: csrc/cuda/supported.h must define FQ_HEAD_DIMS on one line")


def known_archs(compiler: list[str]) -> list[str]:
    """Those of CUDA_ARCHS that this nvcc compiles for: before 12.8 it knows no sm_100 and 120."""
    command = [*compiler, "--list-gpu-code"]
    try:
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        sys.exit(f"setup.py: no compiler: {command[0]} not found; install it, or set CUDACXX")
    except subprocess.CalledProcessError as error:
        sys.exit(f"setup.py: exit status {error.returncode} from: {shlex.join(command)}")
    wanted = CUDA_ARCHS.split()
    known = [arch for arch in wanted if f"sm_{arch}" in listed]
    if not known:
        sys.exit(f"setup.py: nvcc must compile for one of sm_{CUDA_ARCHS}, got {' '.join(listed)}")
    if known != wanted:
        left_out = " ".join(arch for arch in wanted if arch not in known)
        print(f"setup.py: this nvcc has no code for sm_{left_out}: left out", flush=True)
    return known


class BuildCuda(Command):
    """Builds the CUDA library, or its emulation."""

    description = "build the CUDA library"
    user_options = [("emulated", None, "for the emulator, with the C++ compiler")]
    boolean_options = ["emulated"]

    def initialize_options(self) -> None:
        self.emulated = False

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        if self.emulated:
            compiler = shlex.split(os.environ.get("CXX", "g++"))
            flags, language = EMULATED_FLAGS, ["-x", "c++"]
            target = ROOT / "build" / EMULATED_LIBRARY
        else:
            compiler = shlex.split(os.environ.get("CUDACXX", "nvcc"))
            archs = os.environ.get("FIBQUANT_CUDA_ARCHS", "").split() or known_archs(compiler)
            codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            oldest = archs[0].rstrip("a")
            flags = [*CUDA_FLAGS, *codes, f"-gencode=arch=compute_{oldest},code=compute_{oldest}"]
            language, target = [], ROOT / "vllm_fibquant" / "lib" / CUDA_LIBRARY
        objects_dir = ROOT / "build" / ("cuda-emulated" if self.emulated else "cuda")
        objects_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        headers = [*(ROOT / "csrc" / "cuda").glob("*.h"), *(ROOT / "csrc").glob("*.h")]

        def compile_unit(unit: tuple[str, str, list[str]]) -> Path:
            name, object_name, defines = unit
            source, output = ROOT / "csrc" / "cuda" / name, objects_dir / object_name
            command = [*compiler, *flags, *defines, abi_flag("cuda")]
            command += ["-I", str(ROOT / "csrc"), *language]
            command += ["-c", str(source), "-o", str(output)]
            run_if_stale(command, output, [source, *headers], False)
            return output

        # Largest first: two processors finish together.
        units = [
            ("kernels.cu", f"kernels_{dim}.o", [f"-DFQ_HEAD_DIM={dim}"])
            for dim in reversed(cuda_head_dims())
        ]
        units.append(("library.cu", "library.o", []))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        built = objects_dir / target.name
        run_if_stale(
            [*compiler, "-shared", *map(str, objects), "-o", str(built)], built, objects, False
        )
        self.copy_file(str(built), str(target))


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def relative_files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


sources = sorted({source for source, _, _ in compile_units()})
library = Extension(
    "vllm_fibquant.lib.fibquant_cpu", sources=sources, depends=relative_files("**/*.h")
)
setup(
    ext_modules=[library],
    cmdclass={
        "build_ext": BuildLibrary,
        "build_cuda": BuildCuda,
        "bdist_wheel": PlatformWheel,
    },
)
