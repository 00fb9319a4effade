"""The text of nvdisasm as basic blocks of instructions, each in a class."""

from __future__ import annotations

import re
import struct
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

_CLASSES = {
    "tensor": r"HGMMA|HMMA|IMMA|QGMMA|UTC\w*MMA|WARPGROUP",
    "exp": r"MUFU",
    "fp32": r"FFMA|FMUL|FADD|FHADD|FHFMA",
    "convert": r"F2F|F2FP|HADD2\.F32|PRMT|I2F|F2I|I2FP|IMAD\.U32",
    "half": r"HFMA2|HMUL2|HADD2",
    "select": r"FMNMX|HMNMX2|FSETP|FSEL|FSET|FCHK|HSETP2",
    "shuffle": r"SHFL",
    "shared": r"LDS|LDSM|STS|STSM",
    "load": r"LDG\.|LDGSTS|UTMALDG|LD\.|UBLKCP",
    "store": r"STG|UTMASTG|ST\.",
    "spill": r"LDL|STL",
    "barrier": r"BAR|SYNCS|DEPBAR|LDGDEPBAR|WARPSYNC|FENCE|MEMBAR|ERRBAR|CCTL",
    "move": r"MOV|IMAD\.MOV|CS2R|R2UR|UMOV|S2R|S2UR|LDC|ULDC|LDCU",
    "integer": r"SHF|IMAD|IADD|LEA|LOP|ISETP|SEL|VIADD|VIMNMX|IMNMX|P2R|R2P|PLOP|IABS|POPC|SGXT|BMSK"
    r"|UIADD|ULEA|ULOP|USHF|UIMAD|UISETP|USEL|UP2UR|UPLOP|USGXT",
    "control": r"BRA|CALL|RET|BSSY|BSYNC|BREAK|EXIT|NOP|YIELD",
}
CLASSES = (*_CLASSES, "other")
"""Classes of instructions, as in the columns of the table; an issue slot is one instruction of one warp."""
_PATTERNS = {name: re.compile(pattern) for name, pattern in _CLASSES.items()}

END = -1
"""Stands for the block after a program's last."""
_BRANCHES = ("BRA", "CALL")
"""ptxas also writes a branch that leaves a loop for good as a call of a local label, which never returns. What other
functions do is not counted: there are none but traps."""
_ENDS = ("EXIT", "RET")
_INDIRECT = ("BRX", "JMP", "JMX")


class SassError(ValueError):
    """Code whose paths cannot be counted."""


class Instruction(NamedTuple):
    """One line of nvdisasm, without its address."""

    guard: str
    """The predicate in front, such as ``@!P0``, or empty."""
    opcode: str
    operands: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Instruction:
        """Parse such as ``@!P0 LDG.E R4, desc[UR6][R2.64]``."""
        guard, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
        opcode, _, operands = rest.strip().partition(" ")
        return cls(guard, opcode, tuple(x.strip().removesuffix(".reuse") for x in operands.split(",") if x.strip()))

    @property
    def kind(self) -> str:
        """The class that it is counted in."""
        return next((name for name, pattern in _PATTERNS.items() if pattern.match(self.opcode)), "other")

    @property
    def predicates(self) -> list[str]:
        """Predicate registers among guard and operands, without negations."""
        names = (x.lstrip("@!") for x in (self.guard, *self.operands))
        return [x for x in names if re.fullmatch(r"U?P\d+", x)]

    @property
    def values(self) -> list[str]:
        """Operands that are no predicates: the result first, then what is read."""
        return [x for x in self.operands if not re.fullmatch(r"!?U?P(\d+|T)", x)]

    @property
    def target(self) -> str | None:
        """The label that a branch goes to; None for one that only a diverged warp takes."""
        if self.opcode.split(".")[0] not in _BRANCHES or ".DIV" in self.opcode or not self.operands:
            return None
        found = re.search(r"`\((\.L_x_\d+)\)", self.operands[-1])
        return found.group(1) if found else None

    @property
    def written(self) -> set[str]:
        """The registers that hold its result, if that takes one register or two."""
        match = re.fullmatch(r"(U?R)(\d+)", next(iter(self.values), ""))
        if match is None or re.match(r"ST|RED|U?ISETP|FSETP|HSETP", self.opcode):
            return set()
        wide = self.opcode == "CS2R" or ".64" in self.opcode or ".WIDE" in self.opcode
        return {f"{match.group(1)}{int(match.group(2)) + i}" for i in range(1 + wide)}

    @property
    def constant(self) -> int | None:
        """The constant that it puts into a register."""
        sources = self.values[1:]
        if self.opcode in ("MOV", "UMOV", "CS2R", "CS2R.32"):
            return value_of(sources[0])
        if self.opcode == "IMAD.MOV.U32" and sources[:2] == ["RZ", "RZ"]:
            return value_of(sources[2])
        if self.opcode in ("HFMA2.MMA", "HFMA2") and [x.lstrip("-") for x in sources[:2]] == ["RZ", "RZ"]:
            # A constant as two half-precision numbers, which another pipe can write.
            high, low = (int.from_bytes(struct.pack("<e", float(x)), "little") for x in sources[2:])
            return high << 16 | low
        return None

    def step(self, name: str) -> int | None:
        """The constant that it adds to the register ``name``, which it writes; None if it is no such addition."""
        if self.guard or self.opcode not in ("IADD3", "UIADD3", "VIADD", "UIADD", "IADD"):
            return None
        rest = [x for x in self.values[1:] if x not in ("RZ", "URZ")]
        if len(rest) != 2 or name not in rest:
            return None
        rest.remove(name)
        return value_of(rest[0])


def value_of(text: str) -> int | None:
    """The value of an operand that is a constant."""
    if text in ("RZ", "URZ", "SRZ"):
        return 0
    return int(text, 16) if re.fullmatch(r"-?0x[0-9a-f]+", text) else None


@dataclass
class Block:
    """Instructions that are always run one after the other."""

    instructions: list[Instruction]
    followers: list[int] = field(default_factory=list)

    @cached_property
    def counts(self) -> Counter[str]:
        """Instructions by class."""
        return Counter(instruction.kind for instruction in self.instructions)


def parse_blocks(text: str) -> list[Block]:
    """Basic blocks of the text of nvdisasm, in its order."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(Instruction.parse(match.group(1)))
    if not instructions:
        raise SassError("no instructions found: this is not the text of nvdisasm -c")
    first = {0, *labels.values()}
    for number, instruction in enumerate(instructions):
        name = instruction.opcode.split(".")[0]
        if name in _INDIRECT:
            raise SassError(f"{instruction.opcode}: a branch to an address that is not in the code cannot be followed")
        if instruction.target is not None or name in _ENDS:
            first.add(number + 1)
    starts = sorted(x for x in first if x < len(instructions))
    numbers = {start: number for number, start in enumerate(starts)}
    blocks = []
    for start, stop in zip(starts, [*starts[1:], len(instructions)]):
        last = instructions[stop - 1]
        following = numbers.get(stop, END)
        block = Block(instructions[start:stop])
        if last.target is not None:
            block.followers = [numbers[labels[last.target]]] + ([following] if last.predicates else [])
        elif last.opcode.split(".")[0] in _ENDS:
            block.followers = [END] + ([following] if last.predicates else [])
        else:
            block.followers = [following]
        blocks.append(block)
    return blocks


def products_with_a_in_registers(text: str) -> list[str]:
    """wgmma instructions that read operand A from registers, which older ptxas may miscompile."""
    return re.findall(r"\bHGMMA\S*\s+R\d+,\s*!?R\d+[^;]*", text)
