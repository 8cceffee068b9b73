"""Reads a disassembly: the loops of a kernel and what one pass through each costs.

A pass is a path from the loop's first instruction to the jump back. Of the paths that move the most bytes of global
memory (those that take 16-byte loads where there is a choice) two are kept, the one of the fewest and the one of the
most instructions: the first skips what a token or a tail may need, the second takes every branch. Inner loops count
once, subroutines (64-bit divisions) as their call.
"""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

TEXT = re.compile(r"^\.text\.(\S+):$")
LABEL = re.compile(r"^(\.L_\w+):$")
INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<op>[A-Z][A-Z0-9_.]*)\s*(?P<rest>[^;]*);"
)
TARGET = re.compile(r"`\((\.L_\w+)\)")
PREDICATE = re.compile(r"U?P\d")
GLOBAL = re.compile(r"(?:LDG|STG|LD|ST)\.E")
# Lanes a clock of a multiprocessor: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", 9.0.
ALU = {
    "IADD3", "VIADD", "LOP3", "ISETP", "FSETP", "SEL", "FSEL", "FMNMX", "IMNMX", "VIMNMX", "PRMT", "SHF", "LEA",
    "PLOP3", "I2FP", "F2FP", "IABS",
}  # fmt: skip
FP64 = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
JUMPS = ("BRA", "EXIT", "RET", "BREAK")
SHARED = ("LDS", "STS", "SHFL")


@dataclass(frozen=True)
class Instruction:
    op: str  # with its modifiers: LDG.E.128
    predicate: str  # under which it runs: "" or P0 or !P0
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.op.partition(".")[0]

    @property
    def target(self) -> str | None:
        """The label of a jump. BRA.DIV leads to the slow way of a shuffle whose warp has diverged: not followed."""
        found = TARGET.search(self.operands[-1]) if self.name == "BRA" and ".DIV" not in self.op else None
        return found[1] if found else None

    @property
    def sets(self) -> set[str]:
        """Predicates that it writes: those that lead its operands, or follow the first (a carry)."""
        if self.name in ("BRA", "EXIT", "RET", "CALL"):
            return set()
        leading = itertools.takewhile(PREDICATE.fullmatch, self.operands[1:])
        return {x for x in (*self.operands[:1], *leading) if PREDICATE.fullmatch(x)}

    @property
    def width(self) -> int:
        """Bytes that a thread moves from or to global memory."""
        if not GLOBAL.match(self.op):
            return 0
        found = re.search(r"\.[US]?(8|16|64|128)\b", self.op)
        return int(found[1]) // 8 if found else 4


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)
    next: list[tuple[int, frozenset[str]]] = field(default_factory=list)  # (block, predicates that hold on the way)


@dataclass(frozen=True)
class Pass:
    """What a thread does on one path."""

    loads: Counter  # bytes of an access -> how many
    stores: Counter
    instructions: int
    pipes: dict[str, int]  # alu, sfu (16 lanes a clock: exp, reciprocals, conversions of float64), fp64, shared
    branches: int
    barriers: int
    local: int  # accesses of local memory

    @property
    def loaded(self) -> int:
        return sum(width * count for width, count in self.loads.items())

    @property
    def wide(self) -> int:
        """Bytes by accesses of 16."""
        return 16 * (self.loads[16] + self.stores[16])

    @property
    def bytes(self) -> int:
        return self.loaded + sum(width * count for width, count in self.stores.items())


@dataclass(frozen=True)
class Kernel:
    name: str
    instructions: tuple[Instruction, ...]
    loops: tuple[tuple[Pass, Pass], ...]  # (fewest, most instructions) of the loops that matter, or of the whole kernel
    whole: bool  # no loop matters


def disassemble(cubin: bytes) -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    tool = str(bundled) if bundled.exists() else shutil.which("nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def _blocks(lines: list[str]) -> list[Block]:
    """The control flow graph; block 0 is the entry."""
    blocks, labels = [Block()], {}
    for line in lines:
        if label := LABEL.match(line.strip()):
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif found := INSTRUCTION.search(line):
            operands = tuple(x.strip() for x in found["rest"].split(","))
            blocks[-1].instructions.append(Instruction(found["op"], found["predicate"] or "", operands))
            if found["op"].partition(".")[0] in JUMPS:
                blocks.append(Block())
    for i, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else Instruction("NOP", "", ())
        # `@P0 BRA P2, target` jumps where both hold; of the other way nothing is known.
        needed = frozenset(p for p in (last.predicate, *last.operands[:-1]) if p and last.name in JUMPS)
        if last.target in labels:
            block.next.append((labels[last.target], needed))
        if i + 1 < len(blocks) and (last.name not in JUMPS or needed):
            block.next.append((i + 1, frozenset(map(_not, needed)) if len(needed) == 1 else frozenset()))
    return blocks


def _ordered(blocks: list[Block]) -> tuple[list[int], set[tuple[int, int]]]:
    """(blocks from the entry in topological order without the jumps back, those jumps)."""
    order, back, state = [], set(), {}
    stack = [(0, iter(blocks[0].next))]
    state[0] = "open"
    while stack:
        at, ways = stack[-1]
        for to, _ in ways:
            if state.get(to) == "open":
                back.add((at, to))
            elif to not in state:
                state[to] = "open"
                stack.append((to, iter(blocks[to].next)))
                break
        else:
            state[at] = "done"
            order.append(at)
            stack.pop()
    return order[::-1], back


def _body(blocks: list[Block], head: int, latches: set[int]) -> set[int]:
    """The natural loop: what reaches a latch without passing the head."""
    before = {i: [] for i in range(len(blocks))}
    for i, block in enumerate(blocks):
        for to, _ in block.next:
            before[to].append(i)
    body, todo = {head}, list(latches)
    while todo:
        if (at := todo.pop()) not in body:
            body.add(at)
            todo += before[at]
    return body


def _counts(way: list[tuple[Instruction, bool]]) -> Pass:
    pipes: Counter = Counter()
    loads, stores = Counter(), Counter()
    for instruction, runs in way:
        name = instruction.name
        if instruction.width and runs:
            (stores if name.startswith("ST") else loads)[instruction.width] += 1
        pipes["alu"] += name in ALU
        pipes["sfu"] += name == "MUFU" or (name in ("F2F", "I2F", "F2I") and "64" in instruction.op)
        pipes["fp64"] += name in FP64
        pipes["shared"] += name in SHARED
    named = Counter(instruction.name for instruction, _ in way)
    return Pass(
        loads, stores, len(way), dict(pipes), named["BRA"] + named["CALL"], named["BAR"], named["LDL"] + named["STL"]
    )


def _walk(
    block: Block, known: frozenset[str], leaving: frozenset[str]
) -> tuple[list[tuple[Instruction, bool]], frozenset]:
    """(the instructions with whether each runs, what is known at the end) where `leaving` holds at the end."""
    since, way = {}, []  # predicate -> index of its last change
    for i, instruction in enumerate(block.instructions):
        written = {p.lstrip("!") for p in known} if instruction.name == "R2P" else instruction.sets
        since |= dict.fromkeys(written, i)
        known = frozenset(p for p in known if p.lstrip("!") not in written)
        if instruction.name != "NOP":
            way.append((i, instruction, _not(instruction.predicate) not in known))
    false = {_not(p): since.get(p.lstrip("!"), -1) for p in leaving}
    return [(x, runs and i <= false.get(x.predicate, i)) for i, x, runs in way], known | leaving


def _path(
    blocks: list[Block], back: set[tuple[int, int]], body: set[int], head: int, ends: set[int], sign: int
) -> Pass:
    """The path from head to an end with the most 16-byte accesses, then the fewest narrow loads and the most bytes, of
    the fewest (sign -1) or most (1) instructions. A branch that an earlier one has decided is not taken otherwise."""

    @functools.cache
    def best(at: int, known: frozenset[str]) -> tuple[tuple[int, ...], tuple] | None:
        ways = [(_walk(blocks[at], known, frozenset())[0], ((0,) * 5, None))] if at in ends else []
        for to, leaving in blocks[at].next:
            own, then = _walk(blocks[at], known, leaving)
            possible = to in body and (at, to) not in back and not then & set(map(_not, then))
            if possible and (rest := best(to, then)):
                ways.append((own, rest))
        scored = []
        for own, (score, rest) in ways:
            widths = [x.width for x, runs in own if runs and x.width]
            wide = sum(width for width in widths if width == 16)
            narrow = sum(x.op.startswith("L") and x.width in (1, 2) for x, _ in own)
            cost = (wide, -narrow, sum(widths), -len(widths), sign * len(own))
            scored.append((tuple(a + b for a, b in zip(cost, score)), (own, rest)))
        return max(scored, key=lambda found: found[0], default=None)

    _, rest = best(head, frozenset())
    way = []
    while rest:
        own, rest = rest
        way += own
    return _counts(way)


def kernels(disassembly: str) -> list[Kernel]:
    sections: dict[str, list[str]] = {}
    for line in disassembly.splitlines():
        if text := TEXT.match(line.strip()):
            sections[text[1]] = []
        elif sections:
            list(sections.values())[-1].append(line)
    return [_kernel(name, lines) for name, lines in sections.items()]


def _kernel(name: str, lines: list[str]) -> Kernel:
    blocks = _blocks(lines)
    order, back = _ordered(blocks)
    ends = {i for i in order if blocks[i].instructions and blocks[i].instructions[-1].name == "EXIT"}
    passes = lambda *where: tuple(_path(blocks, back, *where, sign) for sign in (-1, 1))  # noqa: E731
    latches = {head: {a for a, b in back if b == head} for _, head in back}
    bodies = {head: _body(blocks, head, latches[head]) for head in sorted(latches)}
    loops = {head: passes(body, head, latches[head]) for head, body in bodies.items()}
    wide = any(fewest.wide for fewest, _ in loops.values())
    moved = {head: fewest.wide if wide else fewest.bytes for head, (fewest, _) in loops.items()}
    # An outer loop stands for those inside that move little of what it moves, and yields to one that moves most.
    inside = lambda head: [other for other in bodies if other != head and other in bodies[head]]  # noqa: E731
    kept = [head for head in bodies if moved[head] and all(2 * moved[other] < moved[head] for other in inside(head))]
    kept = [head for head in kept if not any(head in inside(other) for other in kept)]
    most = max(moved.values(), default=0)
    whole = passes(set(order), 0, ends)
    counts = most and 4 * most >= (whole[0].wide if wide else whole[0].bytes)
    matter = [loops[head] for head in kept if 2 * moved[head] >= most] if counts else []
    reached = tuple(i for at in sorted(order) for i in blocks[at].instructions if i.name != "NOP")
    return Kernel(name, reached, tuple(matter or [whole]), not matter)


def _not(predicate: str) -> str:
    return predicate[1:] if predicate.startswith("!") else f"!{predicate}" if predicate else ""
