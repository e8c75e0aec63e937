"""This module counts spills, tensor-core instructions and loads of the innermost loops in SASS and AMD's assembly.

Loops are found as in a compiler: a branch to a block that dominates it closes a natural loop. A loop is innermost if it
contains no other that loads from global memory or multiplies on tensor cores (a loop that waits for a barrier does
neither). Not visible here are calls and indirect branches (their bodies count as straight code), how often a loop runs,
and which lanes a predicate disables. So the loads are those in the text, not those executed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

BULK: Final = "bulk"
"""This is the width of a load whose size is in a descriptor and not in the instruction (TMA)."""


@dataclass(frozen=True)
class Instruction:
    opcode: str
    target: str | None = None  # a label that it may jump to
    falls_through: bool = True


Listing = Sequence[Instruction | str]
"""A Listing has instructions in order, and the labels (str) between them."""


@dataclass(frozen=True)
class Stretch:
    """A Stretch is code whose loads are counted together: an innermost loop, or all of a kernel without loops."""

    is_loop: bool
    num_dots: int  # tensor-core instructions
    loads: Mapping[str, int]  # "16": eight loads of 16 bytes a thread; "bulk"

    @property
    def wide_bytes(self) -> int:
        """Return the bytes that a thread loads by vectors of 8 bytes or more; a bulk load counts as one of 16."""
        return sum(n * _num_bytes(width) for width, n in self.loads.items() if _num_bytes(width) >= 8)

    @property
    def narrow_bytes(self) -> int:
        return sum(n * _num_bytes(width) for width, n in self.loads.items() if _num_bytes(width) < 8)


def _num_bytes(width: str) -> int:
    return 16 if width == BULK else int(width)


_SASS_LABEL = re.compile(r"^(\.L_\w+):")
_SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?P<guard>@!?\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*)")
_SASS_TARGET = re.compile(r"`\((\.L_\w+)\)")
_SASS_LEAVES = frozenset({"EXIT", "RET", "BRX", "BRXU", "JMP", "JMX", "KILL", "BPT"})


def parse_sass(text: str) -> list[Instruction | str]:
    """Parse the output of `nvdisasm -c`."""
    listing: list[Instruction | str] = []
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            listing.append(label[1])
        elif match := _SASS_LINE.match(line):
            base = match["opcode"].split(".")[0]
            target = _SASS_TARGET.search(match["operands"]) if base == "BRA" else None
            # A condition is a guard (@P0), or an operand before the target (BRA.U UP0, `(.L_x_1)).
            is_conditional = bool(match["guard"]) or "," in match["operands"]
            leaves = base == "BRA" or base in _SASS_LEAVES
            listing.append(Instruction(match["opcode"], target and target[1], is_conditional or not leaves))
    return listing


_GCN_LABEL = re.compile(r"^(\.LBB\w+):")
_GCN_LINE = re.compile(r"^\t(?P<opcode>[a-z][a-z0-9_]+)(?P<operands>.*)$")


def parse_amdgcn(text: str) -> list[Instruction | str]:
    """Parse LLVM's assembly for AMD GPUs."""
    listing: list[Instruction | str] = []
    for line in text.splitlines():
        if label := _GCN_LABEL.match(line):
            listing.append(label[1])
        elif match := _GCN_LINE.match(line):
            opcode = match["opcode"]
            target = match["operands"].split(";")[0].strip() if re.match(r"s_c?branch", opcode) else None
            leaves = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
            listing.append(Instruction(opcode, target, not leaves))
    return listing


def resources(text: str) -> dict[str, int]:
    """Parse the output of `cuobjdump -res-usage`: REG (registers of a thread), STACK (bytes), and others."""
    return {name: int(number) for name, number in re.findall(r"(\b[A-Z]+)(?:\[\d+\])?:(\d+)", text)}


def amd_metadata(text: str) -> dict[str, int]:
    """Parse the kernel's metadata at the end of LLVM's assembly: vgpr_count, private_segment_fixed_size ..."""
    metadata = text.rpartition("amdhsa.kernels:")[2]
    return {name: int(number) for name, number in re.findall(r"^ +(?:- )?\.(\w+): +(\d+)$", metadata, re.MULTILINE)}


_TENSOR_CORE = re.compile(r"(?:[BDHIOQ]G?MMA|UTC\w*MMA)(?=\.|$)|v_s?mfma_\w+")


def tensor_core(instructions: Iterable[Instruction]) -> Counter[str]:
    """Count each tensor-core instruction: HMMA, HGMMA, UTCHMMA; v_mfma_..."""
    return Counter(match[0] for i in instructions if (match := _TENSOR_CORE.match(i.opcode)))


def dots_without_tensor_core(ttgir: str) -> int:
    """Count the products of tiles that Triton's IR leaves to multiply-adds: their results lack a tensor-core layout."""
    return len(re.findall(r"= tt\.dot .*-> tensor<[^>]*#blocked\w*>", ttgir))


def count(instructions: Iterable[Instruction], *prefixes: str) -> int:
    return sum(i.opcode.startswith(prefixes) for i in instructions)


_GCN_LOAD = re.compile(r"(?:global|buffer|flat)_load_(?:lds_)?(dwordx[234]|dword|[us]?short|[us]?byte)")
_GCN_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


def load_width(opcode: str) -> str | None:
    """Return the bytes that an instruction loads from global memory for one thread, BULK, or None if it loads none."""
    base, *modifiers = opcode.split(".")
    if base in ("UTMALDG", "UBLKCP"):
        return BULK
    if base in ("LDG", "LDGSTS", "LD"):
        for modifier in modifiers:
            if modifier in ("U8", "S8"):
                return "1"
            if modifier in ("U16", "S16"):
                return "2"
            if modifier in ("64", "128", "256"):
                return str(int(modifier) // 8)
        return "4"
    if match := _GCN_LOAD.match(opcode):
        return str(_GCN_BYTES.get(match[1], 2 if "short" in match[1] else 1))
    return None


def _stretch(instructions: Sequence[Instruction], *, is_loop: bool) -> Stretch:
    loads = Counter(width for i in instructions if (width := load_width(i.opcode)) is not None)
    return Stretch(is_loop, tensor_core(instructions).total(), dict(sorted(loads.items())))


def stretches(listing: Listing) -> list[Stretch]:
    """Return the innermost loops that load or multiply, the main loop first; a kernel without one is one stretch.

    The main loop is the one with most tensor-core instructions, then with most bytes.
    """
    blocks, successors = _blocks(listing)
    loops = {loop: _stretch([i for b in loop for i in blocks[b]], is_loop=True) for loop in _loops(successors)}
    busy = {loop: stretch for loop, stretch in loops.items() if stretch.num_dots or stretch.loads}
    innermost = [stretch for loop, stretch in busy.items() if not any(set(other) < set(loop) for other in busy)]
    if not innermost:
        return [_stretch([i for block in blocks for i in block], is_loop=False)]
    return sorted(innermost, key=lambda s: (-s.num_dots, -s.wide_bytes - s.narrow_bytes))


def _blocks(listing: Listing) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Return the basic blocks, and for each the numbers of the blocks that may follow it."""
    blocks: list[list[Instruction]] = [[]]
    at: dict[str, int] = {}  # label -> block
    for item in listing:
        if isinstance(item, str):
            if blocks[-1]:
                blocks.append([])
            at[item] = len(blocks) - 1
            continue
        blocks[-1].append(item)
        if item.target is not None or not item.falls_through:
            blocks.append([])
    successors: list[list[int]] = []
    for index, block in enumerate(blocks):
        last = block[-1] if block else Instruction("")
        follows = [index + 1] if last.falls_through and index + 1 < len(blocks) else []
        if last.target in at:
            follows.append(at[last.target])
        successors.append(follows)
    return blocks, successors


def _loops(successors: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    """Return the natural loops of a control-flow graph, as sorted blocks; loops that share a header are merged."""
    predecessors: list[set[int]] = [set() for _ in successors]
    for block, follows in enumerate(successors):
        for follower in follows:
            predecessors[follower].add(block)
    dominators = _dominators(predecessors)
    bodies: dict[int, set[int]] = {}
    for block, follows in enumerate(successors):
        for header in follows:
            if header not in dominators[block] or 0 not in dominators[block]:
                continue
            body = bodies.setdefault(header, {header})
            pending = [block]
            while pending:
                if (inside := pending.pop()) not in body:
                    body.add(inside)
                    pending.extend(predecessors[inside])
    return {tuple(sorted(body)) for body in bodies.values()}


def _dominators(predecessors: Sequence[set[int]]) -> list[set[int]]:
    """Return for each block its dominators: the blocks on every path from block 0 to it; empty if it is unreachable."""
    everything = set(range(len(predecessors)))
    dominators = [{0}, *(set(everything) for _ in predecessors[1:])]
    changed = True
    while changed:
        changed = False
        for block in range(1, len(predecessors)):
            before = [dominators[p] for p in predecessors[block]]
            updated = {block} | set.intersection(*before) if before else set()
            changed |= updated != dominators[block]
            dominators[block] = updated
    return dominators
