# SPDX-License-Identifier: Apache-2.0
"""Builds the CPU library: a plain C-ABI shared object, loaded with ctypes.

It includes no Python and no torch header, so one build serves every Python version and the
wheel is tagged py3-none-<platform>. The kernels are compiled once per instruction set; the
library picks one when it is loaded. Everything else about the package is in pyproject.toml.

CXX and CXXFLAGS are respected.
"""

import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
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


def compile_units() -> list[tuple[str, str, list[str]]]:
    """(source, object name, extra flags) of every translation unit."""
    units = [
        ("csrc/cpu/kernels.cpp", f"kernels_{isa}.o", [f"-DFQ_ISA={isa}", *flags])
        for isa, flags in ISA_FLAGS.items()
    ]
    return [*units, ("csrc/cpu/library.cpp", "library.o", [])]


class BuildLibrary(build_ext):
    """Compiles with the C++ compiler directly: one source becomes several objects."""

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
            command = [*compiler, *COMPILE_FLAGS, *flags, "-I", str(ROOT / "csrc"), *user_flags]
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
        sys.exit(f"setup.py: no C++ compiler: {command[0]} not found; install g++ or set CXX")
    except subprocess.CalledProcessError as error:
        sys.exit(f"setup.py: exit status {error.returncode} from: {text}")
    record.write_text(text)


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
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
