"""Machine code as cuobjdump prints it, and the ways through it between two marks (csrc/marks.h)."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------------------------------
# What cuobjdump prints


class Usage(NamedTuple):
    """A kernel's resources in one architecture's machine code; bytes a thread, but `shared` a block."""

    arch: str
    name: str
    registers: int
    stack: int
    local: int
    shared: int


class Instruction(NamedTuple):
    """One instruction: "@!P0 LDG.E.128 R8, [R2]" has guard "!P0", opcode "LDG.E.128" and the rest as operands."""

    address: int
    guard: str
    opcode: str
    operands: str


class Code(NamedTuple):
    """A kernel's machine code."""

    arch: str
    name: str
    instructions: tuple[Instruction, ...]


def read_usage(text: str) -> list[Usage]:
    """The kernels in the output of `cuobjdump -res-usage`."""
    kernels, arch, name = [], "", ""
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line.strip()):
            arch = match[1]
        elif match := re.match(r"Function (\S+):", line.strip()):
            name = match[1]
        elif "REG:" in line and name:
            used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)}
            kernels.append(Usage(arch, name, used["REG"], used["STACK"], used["LOCAL"], used["SHARED"]))
            name = ""
    return kernels


INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


def read_code(text: str) -> list[Code]:
    """The kernels in the output of `cuobjdump -sass`. The loop of padding behind a kernel is left out."""
    found: list[tuple[str, str, list[Instruction]]] = []
    arch = ""
    for line in text.splitlines():
        if match := re.match(r"(?:arch = |code for )(sm_\w+)", line.strip()):
            arch = match[1]
        elif match := re.match(r"Function : (\S+)", line.strip()):
            found.append((arch, match[1], []))
        elif found and (match := INSTRUCTION.search(line)):
            found[-1][2].append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4].strip()))
    return [Code(arch, name, _without_padding(instructions)) for arch, name, instructions in found]


def _without_padding(instructions: list[Instruction]) -> tuple[Instruction, ...]:
    """Without the NOPs at the end and the branch to itself before them."""
    end = len(instructions)
    while end:
        last = instructions[end - 1]
        if last.opcode != "NOP" and target_of(last) != last.address:
            break
        end -= 1
    return tuple(instructions[:end])


# ---------------------------------------------------------------------------------------------
# Paths through the code


def target_of(instruction: Instruction) -> int | None:
    """Where a branch goes; None for what is no branch, or one whose target is in a register."""
    if instruction.opcode.split(".")[0] not in ("BRA", "JMP"):
        return None
    match = re.search(r"(?:^|\s|,)`?\(?(0x[0-9a-f]+)", instruction.operands)
    return int(match[1], 16) if match else None


ENDS = ("EXIT", "RET", "BRX", "JMX")


class Flow:
    """Which instructions may follow which. Calls are one instruction: what they call is not followed."""

    def __init__(self, code: Code):
        self.code = code.instructions
        at = {instruction.address: i for i, instruction in enumerate(self.code)}
        self.next: list[tuple[int, ...]] = []
        for i, instruction in enumerate(self.code):
            always = not instruction.guard and not re.match(r"!?U?P\d", instruction.operands)  # "BRA P0, 0x60" is not
            target = target_of(instruction)
            ends = always and (instruction.opcode.split(".")[0] in ENDS or target is not None)
            follows = [at[target]] if target in at else []
            self.next.append((*follows, i + 1) if i + 1 < len(self.code) and not ends else tuple(follows))
        self._enter_tables()

    def _enter_tables(self) -> None:
        """BRX takes its target from a table, not shown: code that nothing else leads to, up to the next BRX."""
        reached = {there for follows in self.next for there in follows}
        table: int | None = None
        for i, instruction in enumerate(self.code):
            if table is not None and i not in reached:
                self.next[table] += (i,)
            if instruction.opcode.split(".")[0] == "BRX":
                table = i

    def between(self, begin: int, ends: set[int]) -> set[int]:
        """The instructions that may run after `begin` and before one of `ends`, without those; a path that leaves the
        kernel is not between."""
        ahead, stack = {begin}, [begin]
        while stack:
            for there in self.next[stack.pop()]:
                if there not in ahead:
                    ahead.add(there)
                    stack.extend([there] if there not in ends else [])
        arrives, grows = ahead & ends, True
        while grows:  # a few times: as often as branches go back
            grows = False
            for here in sorted(ahead - arrives, reverse=True):
                if any(there in arrives for there in self.next[here]):
                    arrives.add(here)
                    grows = True
        return arrives - ends - {begin}

    def in_order(self, begin: int, among: set[int]) -> tuple[list[int], set[tuple[int, int]]]:
        """`among` in an order in which each comes before what follows it, and the steps back, which loops take."""
        order, back, state = [], set(), {begin: "open"}
        stack = [(begin, iter(self.next[begin]))]
        while stack:
            here, follows = stack[-1]
            there = next((there for there in follows if there in among), None)
            if there is None:
                stack.pop()
                state[here] = "done"
                order.append(here)
            elif state.get(there) == "open":
                back.add((here, there))
            elif there not in state:
                state[there] = "open"
                stack.append((there, iter(self.next[there])))
        return order[::-1], back


class Section(NamedTuple):
    """The instructions between a begin and an end of one mark.

    Loops inside count once. A name that the compiler copied has a section for each copy.
    """

    mark: str
    longest: int
    """On the longest way."""
    shortest: int
    """On the shortest way."""
    all: int
    """On any way: with both sides of every branch."""
    opcodes: dict[str, int]
    """Of all: how many instructions of each opcode's first word, loads and stores with their bits: "LDG.128"."""


def mark_number(name: str) -> int:
    """csrc/marks.h's number of a name."""
    number = 0x811C9DC5
    for byte in name.encode():
        number = (number ^ byte) * 0x01000193 & 0xFFFFFFFF
    return number >> 17 or 1


def marks_in(folder: Path = ROOT / "csrc") -> list[str]:
    """The names that the sources begin."""
    texts = [path.read_text() for pattern in ("*.cuh", "*.cu", "*.h") for path in sorted(folder.rglob(pattern))]
    lines = [line for text in texts for line in text.splitlines() if not line.lstrip().startswith("//")]
    names = {name for line in lines for name in re.findall(r"DOUBLEHEAD_MARK_BEGIN\(\"([^\"]+)\"\)", line)}
    return sorted(names)


def _mark_of(instruction: Instruction) -> int | None:
    return int(instruction.operands, 16) if instruction.opcode == "PMTRIG" else None


def sections(code: Code, names: list[str]) -> list[Section]:
    """Between each begin of these names and the ends that can follow it."""
    flow, found = Flow(code), []
    for name in names:
        number = 2 * mark_number(name)
        ends = {i for i, instruction in enumerate(flow.code) if _mark_of(instruction) == number + 1}
        begins = [i for i, instruction in enumerate(flow.code) if _mark_of(instruction) == number]
        found += [_measure(name, flow, begin, ends) for begin in begins]
    return found


def _measure(name: str, flow: Flow, begin: int, ends: set[int]) -> Section:
    inside = flow.between(begin, ends)
    order, back = flow.in_order(begin, inside | ends)
    ways: dict[int, tuple[int, int]] = {}  # from an instruction to an end: the most and the fewest instructions
    for here in reversed(order):
        after = [ways[there] for there in flow.next[here] if (here, there) not in back and there in ways]
        own = here in inside and _mark_of(flow.code[here]) is None
        if here in ends:
            ways[here] = (0, 0)
        elif after:
            ways[here] = (own + max(most for most, _ in after), own + min(fewest for _, fewest in after))
    longest, shortest = ways.get(begin, (0, 0))
    real = [flow.code[i] for i in sorted(inside) if _mark_of(flow.code[i]) is None]
    return Section(name, longest, shortest, len(real), dict(count_opcodes(real)))


MEMORY = ("LDG", "STG", "LDS", "STS", "LDL", "STL", "LD", "ST", "LDGSTS")


def count_opcodes(instructions: list[Instruction] | tuple[Instruction, ...]) -> Counter[str]:
    """How many of each; accesses of memory with their bits, as "LDG.128"."""
    counts: Counter[str] = Counter()
    for instruction in instructions:
        kind, *suffixes = instruction.opcode.split(".")
        if kind in MEMORY:
            bits = [word for word in suffixes if word in ("8", "16", "U8", "S8", "U16", "S16", "64", "128")]
            kind = f"{kind}.{bits[0].lstrip('US') if bits else 32}"
        counts[kind] += 1
    return counts
