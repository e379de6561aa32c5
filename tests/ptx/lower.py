# SPDX-License-Identifier: Apache-2.0
"""From an instruction to a function that runs it for the active threads."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from functools import cached_property

import numpy as np

from tests.ptx import arithmetic
from tests.ptx.arithmetic import FUNCTIONS, TYPES, WIDE
from tests.ptx.collectives import multiply, transpose
from tests.ptx.memory import Global, Shared, Where
from tests.ptx.parse import Fault, Instruction, Kernel

Step = Callable[["Active"], None]


class Active:
    """The threads that run an instruction."""

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask
        self.count = int(np.count_nonzero(mask))
        self.where = True if self.count == len(mask) else mask  # as ufuncs take it

    @cached_property
    def lanes(self) -> np.ndarray:
        return np.flatnonzero(self.mask)

    def whole(self, threads: int) -> bool:
        """Whether these are whole CTAs."""
        if self.where is True:
            return True
        ctas = self.mask.reshape(-1, threads)
        return bool((ctas.all(1) == ctas.any(1)).all())


class Lowering:
    """Registers, and how each instruction works on them.

    Attributes:
        registers: by name, arrays [threads] of unsigned integers or bool. They begin as ones.
    """

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], where: Where, shared: Shared,
        memory: Global, params: bytes,
    ) -> None:  # fmt: skip
        self.kernel, self.where, self.shared, self.memory = kernel, where, shared, memory
        self.lanes = len(where.ctas) * where.threads
        self.params = {
            size: np.frombuffer(params[: len(params) // size * size], f"u{size}")
            for size in (1, 2, 4, 8)
        }
        self.registers: dict[str, np.ndarray] = {}
        self.everyone = np.arange(self.lanes)
        cta = np.array(where.ctas, np.uint32)[self.everyone // where.threads]
        tid = (self.everyone % where.threads).astype(np.uint32)
        self.special = {"%tid.x": tid, "%laneid": tid % np.uint32(32)}
        self.special["%ntid.x"] = np.uint32(where.threads)
        for i, axis in enumerate("xyz"):
            self.special[f"%ctaid.{axis}"] = np.ascontiguousarray(cta[:, i])
            self.special[f"%nctaid.{axis}"] = np.uint32(grid[i])

    # ---- operands

    def register(self, name: str) -> np.ndarray:
        if name not in self.registers:
            kinds = self.kernel.registers
            kind = kinds.get(name) or kinds.get(name.rstrip("0123456789"))
            if kind is None:
                raise Fault(f"{name} is no register")
            size = np.dtype(TYPES[kind]).itemsize
            dtype = np.dtype(np.bool_ if kind == "pred" else f"u{size}")
            self.registers[name] = np.full(
                self.lanes, True if kind == "pred" else 256**size - 1, dtype
            )
        return self.registers[name]

    def predicate(self, guard: str) -> np.ndarray:
        value = self.register(guard.lstrip("!"))
        return ~value if guard[0] == "!" else value

    def source(self, text: str, kind: type) -> np.ndarray:
        """The operand as an array [threads] or a number, of the instruction's type."""
        if text in self.special:
            return self.special[text].view(kind)
        if text in self.kernel.symbols:
            return np.dtype(kind).type(self.kernel.symbols[text])
        if text[0] == "%" or text in self.kernel.registers:
            register = self.register(text)
            if register.dtype.itemsize != np.dtype(kind).itemsize:
                raise Fault(f"{text} has {register.dtype.itemsize * 8} bits, not those of {kind}")
            return register.view(kind)
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            return np.frombuffer(struct.pack("<I", int(match[1], 16)), np.float32)[0]
        if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            raise Fault(f"{text} is no operand")
        value = int(text.rstrip("U"), 0)
        if kind is np.bool_:
            return np.bool_(value)
        dtype = np.dtype(kind)
        bits = np.array(value % (1 << 8 * dtype.itemsize), f"u{dtype.itemsize}")
        return bits.view(dtype)[()]

    def low_part(self, text: str, kind: type) -> Callable[[], np.ndarray]:
        """A function to an operand whose register may be wider than the type."""
        size = np.dtype(kind).itemsize
        if text[0] == "%" and text not in self.special and self.register(text).itemsize > size:
            register = self.register(text)
            return lambda: register.astype(f"u{size}").view(kind)
        fixed = self.source(text, kind)
        return lambda: fixed

    def target(self, text: str, kind: type) -> Callable:
        """A function (active, value) that writes a register, widened where it is wider."""
        register = self.register(text)
        dtype = np.dtype(kind)
        if register.dtype == np.bool_ or register.dtype.itemsize == dtype.itemsize:
            view = register.view(dtype)
        elif dtype.kind == "f" or register.dtype.itemsize < dtype.itemsize:
            raise Fault(f"{text} cannot hold {kind}")
        else:
            view = register.view(f"{dtype.kind}{register.dtype.itemsize}")

        def write(active: Active, value) -> None:
            np.copyto(view, value, where=active.where)

        return write

    def address(self, text: str) -> Callable[[], np.ndarray]:
        """A function to the addresses [threads], int64, that an operand in brackets stands for."""
        match = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", text)
        if match is None:
            raise Fault(f"{text} is no address")
        offset = int(match[2] or 0)
        if match[1] in self.kernel.symbols:
            fixed = np.full(self.lanes, self.kernel.symbols[match[1]] + offset, np.int64)
            return lambda: fixed
        register = self.register(match[1])
        return lambda: register.astype(np.int64) + offset

    # ---- instructions

    def lower(self, instruction: Instruction) -> Step:
        """The function that runs an instruction.

        Raises:
            Fault: one that the interpreter does not know.
        """
        try:
            step = self._lower(instruction)
        except Fault as fault:
            raise Fault(f"{fault} in {self.kernel.name}, {instruction}") from None
        if instruction.guard is None:
            return step
        if "sync" in instruction.op:
            raise Fault(f"a collective under a predicate: {instruction}")
        guard = instruction.guard

        def guarded(active: Active) -> None:
            some = Active(active.mask & self.predicate(guard))
            if some.count:
                step(some)

        return guarded

    def _lower(self, instruction: Instruction) -> Step:
        op = instruction.op
        if op[0] in ("ld", "st", "atom", "cp"):
            return getattr(self, "_" + op[0])(op, instruction.operands)
        if op[0] in ("shfl", "vote", "bar", "mma", "movmatrix"):
            return self._collective(".".join(op), instruction.operands)
        if op[0] == "setp":
            return self._setp(op, instruction.operands)
        if op[0] in ("cvt", "cvta"):
            return self._convert(op, instruction.operands)
        if op[0] == "mov" and "{" in "".join(instruction.operands):
            return self._pack(op, *instruction.operands)
        return self._compute(op, instruction.operands)

    def _compute(self, op: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        name, kind = ".".join(op[:-1]), TYPES.get(op[-1])
        if name not in FUNCTIONS or kind is None:
            raise Fault(f"no instruction {'.'.join(op)}")
        result, kinds, function = FUNCTIONS[name]
        letters = {"t": kind, "u": np.uint32, "p": np.bool_, "w": WIDE.get(kind)}
        if len(operands) != len(kinds) + 1:
            raise Fault(f"{name} takes {len(kinds) + 1} operands")
        write = self.target(operands[0], letters[result])
        sources = [self.source(x, letters[k]) for x, k in zip(operands[1:], kinds, strict=True)]
        return lambda active: write(active, function(*sources))

    def _setp(self, op: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        kind = TYPES[op[-1]]
        compare = arithmetic.comparison(op[1], op[-1] == "f32")
        if compare is None or len(op) != 3 or "|" in operands[0]:
            raise Fault(f"no comparison {'.'.join(op)}")
        write = self.target(operands[0], np.bool_)
        a, b = (self.source(x, kind) for x in operands[1:])
        return lambda active: write(active, compare(a, b))

    def _convert(self, op: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        name = ".".join(op)
        if name == "cvt.rn.f16x2.f32":
            write = self.target(operands[0], np.uint32)
            high, low = (self.source(x, np.float32) for x in operands[1:])
            return lambda active: write(active, arithmetic.halves(high, low))
        if op[0] == "cvta":  # generic addresses: global ones as they are, shared ones never
            if name not in ("cvta.to.global.u64", "cvta.shared.u64", "cvta.to.shared.u64"):
                raise Fault(f"no instruction {name}")
            write, x = self.target(operands[0], np.uint64), self.source(operands[1], np.uint64)
            return lambda active: write(active, x)
        to, source = TYPES.get(op[-2]), TYPES.get(op[-1])
        between_integers = all(
            t in TYPES and TYPES[t] != np.float16 and t[0] in "us" for t in op[1:]
        )
        known = ("cvt.f32.f16", "cvt.rn.f32.s32", "cvt.rn.f32.u32", "cvt.rn.f16.f32")
        if not (between_integers and len(op) == 3) and name not in known:
            raise Fault(f"no instruction {name}")
        write, x = self.target(operands[0], to), self.low_part(operands[1], source)
        return lambda active: write(active, x().astype(to))

    def _pack(self, op: tuple[str, ...], target: str, source: str) -> Step:
        """mov between a register of 32 or 64 bits and a vector of two halves."""
        whole = TYPES[op[1]]
        half = {np.uint32: np.uint16, np.uint64: np.uint32}[whole]
        bits = whole(8 * np.dtype(half).itemsize)
        if target[0] == "{":
            writes = [self.target(x, half) for x in _vector(target)]
            x = self.source(source, whole)

            def unpack(active: Active) -> None:
                for i, write in enumerate(writes):
                    write(active, (x >> bits * whole(i)).astype(half))

            return unpack
        write = self.target(target, whole)
        low, high = (self.source(x, half) for x in _vector(source))
        return lambda active: write(active, high.astype(whole) << bits | low.astype(whole))

    # ---- memory

    def _ld(self, op: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        names, kind = _vector(operands[0]), TYPES[op[-1]]
        self._check_memory(op, ("param", "global", "shared"), len(names))
        size = np.dtype(kind).itemsize
        address = self.address(operands[1])
        writes = [self.target(x, kind) for x in names]
        load = {"param": self._load_param, "global": self.memory.load, "shared": self.shared.load}[
            op[1]
        ]

        def step(active: Active) -> None:
            lanes = active.lanes
            at = address()[lanes]
            if op[1] == "global":
                at = at.astype(np.uint64)
            values = load(self.where, lanes, at, size, len(names)).view(kind)
            for i, write in enumerate(writes):
                value = np.zeros(self.lanes, kind)
                value[lanes] = values[:, i]
                write(active, value)

        return step

    def _st(self, op: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        names, kind = _vector(operands[1]), TYPES[op[-1]]
        self._check_memory(op, ("global", "shared"), len(names))
        kind = np.dtype(f"u{np.dtype(kind).itemsize}").type
        address = self.address(operands[0])
        sources = [self.low_part(x, kind) for x in names]
        memory = self.shared if op[1] == "shared" else self.memory

        def step(active: Active) -> None:
            lanes = active.lanes
            values = np.stack([np.broadcast_to(x(), self.lanes)[lanes] for x in sources], 1)
            at = address()[lanes]
            memory.store(
                self.where, lanes, at if op[1] == "shared" else at.astype(np.uint64), values
            )

        return step

    @staticmethod
    def _check_memory(op: tuple[str, ...], spaces: tuple[str, ...], count: int) -> None:
        between = () if count == 1 else (f"v{count}",)
        if op[1] not in spaces or tuple(x for x in op[2:-1] if x != "nc") != between:
            raise Fault(f"no instruction {'.'.join(op)}")

    def _load_param(self, where: Where, lanes, at, size: int, count: int):
        if (at % (size * count) != 0).any() or (at + size * count > self.kernel.param_bytes).any():
            raise where.fault(int(lanes[0]), f"parameter address {int(at[0])} is out of bounds")
        return self.params[size][(at // size)[:, None] + np.arange(count)]

    def _atom(self, op: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        if ".".join(op) not in ("atom.global.add.u32", "atom.global.add.s32"):
            raise Fault(f"no instruction {'.'.join(op)}")
        write, address = self.target(operands[0], np.uint32), self.address(operands[1])
        source = np.broadcast_to(self.source(operands[2], np.uint32), self.lanes)

        def step(active: Active) -> None:
            lanes, value = active.lanes, np.zeros(self.lanes, np.uint32)
            at = address()[lanes].astype(np.uint64)
            value[lanes] = self.memory.add(self.where, lanes, at, source[lanes])
            write(active, value)

        return step

    def _cp(self, op: tuple[str, ...], operands: tuple[str, ...]) -> Step:
        name = ".".join(op)
        if name == "cp.async.commit_group":
            return lambda active: self.shared.commit(active.lanes)
        if name == "cp.async.wait_group":
            pending = int(operands[0])
            return lambda active: self.shared.wait(active.lanes, pending)
        if name != "cp.async.cg.shared.global" or operands[2] != "16":
            raise Fault(f"no instruction {name} of {operands[-1]} bytes")
        to, source = (self.address(x) for x in operands[:2])

        def step(active: Active) -> None:
            lanes = active.lanes
            at = source()[lanes].astype(np.uint64)
            self.shared.copy(lanes, to()[lanes], self.memory.load(self.where, lanes, at, 4, 4))

        return step

    # ---- collectives: the machine runs them with whole warps, or CTAs

    def _collective(self, name: str, operands: tuple[str, ...]) -> Step:
        if name == "bar.sync" and operands == ("0",):
            return lambda active: self.shared.sync(active.lanes, True)
        if name == "bar.warp.sync":
            check = self._check_all(operands[0])

            def meet(active: Active) -> None:
                check(active)
                self.shared.sync(active.lanes, False)

            return meet
        if name == "shfl.sync.bfly.b32":
            return self._shuffle(operands)
        if name == "vote.sync.any.pred":
            return self._vote(operands)
        if name == "movmatrix.sync.aligned.m8n8.trans.b16":
            write, x = self.target(operands[0], np.uint32), self.source(operands[1], np.uint32)
            return lambda active: write(active, transpose(x))
        shape, _, kinds = name.partition(".row.col.")
        if shape == "mma.sync.aligned.m16n8k16" and kinds == "f32.f16.f16.f32":
            return self._mma(operands)
        raise Fault(f"no instruction {name}")

    def _check_all(self, text: str) -> Callable[[Active], None]:
        """Checks that a mask of lanes is that of the whole warp, where it is known."""
        mask = self.source(text, np.uint32)

        def check(active: Active) -> None:
            if (np.broadcast_to(mask, self.lanes)[active.lanes] != 0xFFFFFFFF).any():
                raise Fault(f"{text} must name all lanes")

        return check

    def _vote(self, operands: tuple[str, ...]) -> Step:
        write, check = self.target(operands[0], np.bool_), self._check_all(operands[2])

        def step(active: Active) -> None:
            check(active)
            votes = self.predicate(operands[1]).reshape(-1, 32)
            write(active, np.repeat(votes.any(1), 32))

        return step

    def _shuffle(self, operands: tuple[str, ...]) -> Step:
        target, _, valid = operands[0].partition("|")
        write = self.target(target, np.uint32)
        write_valid = self.target(valid, np.bool_) if valid else None
        x, flip, clamp = (self.source(o, np.uint32) for o in operands[1:4])
        check = self._check_all(operands[4])
        lanes = self.everyone

        def step(active: Active) -> None:
            check(active)
            if (np.broadcast_to(clamp, self.lanes)[active.lanes] != 31).any():
                raise Fault("shuffles within a part of the warp are not known")
            write(active, np.broadcast_to(x, self.lanes)[lanes ^ (flip & np.uint32(31))])
            if write_valid is not None:
                write_valid(active, True)

        return step

    def _mma(self, operands: tuple[str, ...]) -> Step:
        d, a, b, c = map(_vector, operands)
        writes = [self.target(x, np.float32) for x in d]
        a, b = ([self.source(x, np.uint32) for x in side] for side in (a, b))
        c = [self.source(x, np.float32) for x in c]

        def step(active: Active) -> None:
            for write, value in zip(writes, multiply(a, b, c), strict=True):
                write(active, value)

        return step


def _vector(text: str) -> list[str]:
    return [x.strip() for x in text.strip("{}").split(",")]
