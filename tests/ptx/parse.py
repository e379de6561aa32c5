# SPDX-License-Identifier: Apache-2.0
"""PTX text to instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass


class Fault(Exception):
    """What a GPU would do wrong or silently, or what the interpreter does not know."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        line: in the PTX text.
        guard: "%p1" or "!%p1", the predicate it runs under, or None.
        op: the opcode, split at its dots.
        operands: as written; vectors with their braces, addresses with their brackets.
    """

    line: int
    text: str
    guard: str | None
    op: tuple[str, ...]
    operands: tuple[str, ...]

    def __str__(self) -> str:
        return f"PTX line {self.line}: {self.text}"


@dataclass
class Kernel:
    """One kernel.

    Attributes:
        max_threads: of a CTA, from its launch bounds.
        param_bytes: bytes of its one parameter, which stands at address 0 of the parameter space.
        registers: the declared type, such as "b32", by the register's name without its number.
        labels: by name, the position in `body` of what follows.
        symbols: addresses of the parameter and of dynamic shared memory.
    """

    name: str
    max_threads: int
    param_bytes: int
    registers: dict[str, str]
    body: list[Instruction]
    labels: dict[str, int]
    symbols: dict[str, int]


_ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\s*\(")
_SHARED = re.compile(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]")
_PARAM = re.compile(r"\.param\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d+)\]")


def kernel_names(text: str) -> list[str]:
    """The kernels of a module, as the compiler mangles them."""
    return _ENTRY.findall(text)


def kernel_text(text: str, name: str) -> str:
    """Everything of one kernel, with the declarations before the module's first one."""
    found = [m for m in _ENTRY.finditer(text) if m[1] == name]
    if len(found) != 1:
        raise Fault(f"kernel_text: name must be one of {kernel_names(text)}, got {name}")
    end = text.index("\n}\n", found[0].start()) + 3
    first = _ENTRY.search(text)
    assert first is not None
    before = text[: found[0].start()]
    skipped = before.count("\n") - text[: first.start()].count("\n")
    return text[: first.start()] + "\n" * skipped + text[found[0].start() : end]


def parse(text: str) -> Kernel:
    """The only kernel of `text`, as `kernel_text` gives it."""
    text = re.sub(r"//[^\n]*", "", text)
    entry = _ENTRY.search(text)
    assert entry is not None, "text must hold a kernel"
    head, body = text[entry.start() :].split("{", 1)
    params = _PARAM.findall(head)
    if len(params) != 1:
        raise Fault(f"parse: a kernel must have one parameter, a struct, got {params}")
    bound = re.search(r"\.maxntid\s+(\d+)", head)
    kernel = Kernel(
        entry[1], int(bound[1]) if bound else 1024, int(params[0][1]), {}, [], {},
        {params[0][0]: 0, **dict.fromkeys(_SHARED.findall(text), 0)},
    )  # fmt: skip
    line = text[: entry.start()].count("\n") + head.count("\n") + 1
    for statement in body[: body.rindex("}")].split(";"):
        _add(kernel, statement, line)
        line += statement.count("\n")
    return kernel


def _add(kernel: Kernel, statement: str, line: int) -> None:
    blank = len(statement) - len(statement.lstrip())
    line += statement[:blank].count("\n")
    statement = statement.strip()
    while label := re.match(r"(\$?\w+):(?!:)\s*", statement):
        kernel.labels[label[1]] = len(kernel.body)
        line += label[0].count("\n")
        statement = statement[label.end() :]
    statement = re.sub(r"^(}\s*)*({\s*(?=\.reg))?", "", statement)  # a block of its own
    if not statement or statement.startswith(".pragma"):
        return
    if register := re.fullmatch(r"\.reg\s+\.(\w+)\s+(%?\w+)(<\d+>)?", statement):
        kernel.registers[register[2]] = register[1]
        return
    match = re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL)
    if match is None:
        raise Fault(f"line {line}: cannot read: {statement}")
    operands = tuple(x.strip() for x in re.split(r",(?![^{\[]*[}\]])", match[3]) if x.strip())
    text = " ".join(statement.split())
    kernel.body.append(Instruction(line, text, match[1], tuple(match[2].split(".")), operands))
