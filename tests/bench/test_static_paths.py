"""Instructions that a warp issues, counted by control flow, on small machine code."""

import pytest

from dcscale.bench.attention.static.paths import Code
from dcscale.bench.attention.static.sass import CLASSES, Instruction, SassError, products_with_a_in_registers

HEADS = 5
"""Trips of loops without a counter: no loop below has as many."""


def code(text):
    """The control flow of lines that are instructions, or labels with a colon."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    numbered = [line if line.endswith(":") else f"        /*{16 * i:04x}*/   {line} ;" for i, line in enumerate(lines)]
    return Code("\n".join(numbered))


def counts(text):
    """Instructions of the three paths."""
    paths = code(text).paths(HEADS)
    return tuple(path.instructions for path in paths)


def loop(body, trips=8, label=0):
    return f"""
        UMOV UR{label}, 0x{trips:x}
        .L_x_{label}:
        {body}
        UIADD3 UR{label}, UR{label}, -0x1, URZ
        ISETP.NE.U32.AND P{label}, PT, RZ, UR{label}, PT
        @P{label} BRA `(.L_x_{label})
    """


def test_a_loop_runs_as_often_as_its_counter_says():
    found = code("MOV R1, R2" + loop("FFMA R0, R0, R1, R1\nLDG.E R3, desc[UR6][R4.64]") + "EXIT")
    path = found.paths(HEADS).interior
    assert path.counts == {"move": 2, "fp32": 8, "load": 8, "integer": 16, "control": 9}
    assert (path.instructions, path.reading, path.assumed) == (43, 8, 0)
    ((each, once),) = found.inner_loops()
    assert (each.trips, once.interior.instructions) == (8, 5)


COUNTERS = {
    "compared before it is changed": (
        "MOV R5, RZ\n.L_x_0:\nISETP.GE.AND P0, PT, R5, 0x6, PT\nIADD3 R5, R5, 0x2, RZ\n@!P0 BRA `(.L_x_0)\nEXIT",
        4,  # 0, 2, 4, 6
    ),
    "64 bits": (
        "UMOV UR5, 0x3\nUMOV UR4, URZ\n.L_x_0:\nUIADD3 UR5, UP0, UPT, UR5, -0x1, URZ\n"
        "UIADD3.X UR4, UPT, UPT, UR4, -0x1, URZ, UP0, !UPT\nUISETP.NE.U32.AND UP1, UPT, UR5, URZ, UPT\n"
        "UISETP.NE.U32.AND.EX UP1, UPT, UR4, URZ, UPT, UP1\nBRA.U UP1, `(.L_x_0)\nEXIT",
        3,
    ),
    "from a negative number, through a copied predicate": (
        "UMOV UR7, 0xfffffffa\n.L_x_0:\nUIADD3 UR7, UR7, 0x3, URZ\nUISETP.NE.U32.AND UP0, UPT, UR7, URZ, UPT\n"
        "PLOP3.LUT P2, PT, PT, PT, UP0, 0x80, 0x0\n@P2 BRA `(.L_x_0)\nEXIT",
        2,
    ),
    "from two half-precision numbers": (
        "HFMA2.MMA R9, -RZ, RZ, 0, 2.384185791015625e-07\n.L_x_0:\nVIADD R9, R9, 0xffffffff\n"
        "ISETP.GT.AND P0, PT, R9, RZ, PT\n@P0 BRA `(.L_x_0)\nEXIT",
        4,
    ),
    "left in the middle, by a call that never returns": (
        "CS2R R8, SRZ\n.L_x_0:\nIADD3 R9, R9, 0x1, RZ\nISETP.NE.AND P0, PT, R9, 0x7, PT\n"
        "@!P0 CALL.REL.NOINC `(.L_x_1)\nBRA `(.L_x_0)\n.L_x_1:\nEXIT",
        7,
    ),
}


@pytest.mark.parametrize(("text", "trips"), COUNTERS.values(), ids=COUNTERS)
def test_counters_that_compilers_write_are_found(text, trips):
    (found,) = code(text).loops.values()
    assert found.trips == trips


UNKNOWN = {
    "starts with an argument": "LDC R5, c[0x0][0x210]\n.L_x_0:\nIADD3 R5, R5, -0x1, RZ",
    "is changed twice": "MOV R5, RZ\n.L_x_0:\nIADD3 R5, R5, -0x1, RZ\nIADD3 R5, R5, -0x2, RZ",
    "is not an addition": "MOV R5, RZ\n.L_x_0:\nIMAD R5, R5, R5, RZ",
    "starts with one of two constants": "MOV R5, 0x4\n@P3 MOV R5, 0x2\n.L_x_0:\nIADD3 R5, R5, -0x1, RZ",
}


@pytest.mark.parametrize("text", UNKNOWN.values(), ids=UNKNOWN)
def test_trips_are_assumed_and_marked_where_no_counter_is_found(text):
    text += "\nISETP.NE.AND P0, PT, R5, RZ, PT\n@P0 BRA `(.L_x_0)\nEXIT"
    found = code(text)
    path = found.paths(HEADS).edge
    (each,) = found.loops.values()
    assert each.trips is None
    assert path.assumed == 1
    before, inside = (len(part.splitlines()) for part in text.split(".L_x_0:\n", 1))
    assert path.instructions == before + HEADS * (inside - 1) + 1


MASK = "LDG.E R3, desc[UR6][R4.64]\n@P4 BRA `(.L_x_9)\nFSEL R3, R3, R9, P5\nFSEL R4, R4, R9, P5\n.L_x_9:"


def test_a_mask_is_counted_in_edge_tiles_only():
    interior, edge, _ = counts(loop(MASK) + "EXIT")
    assert edge - interior == 8 * 2


def test_of_two_copies_of_a_loop_an_interior_tile_takes_the_shorter_one():
    masked = loop("LDG.E R3, desc[UR6][R4.64]\nFSEL R3, R3, R9, P5", label=1)
    plain = loop("LDG.E R3, desc[UR6][R4.64]", label=2)
    text = f"@P6 BRA `(.L_x_7)\n{masked}EXIT\n.L_x_7:\n{plain}EXIT"
    interior, edge, _ = counts(text)
    assert (interior, edge) == (1 + 1 + 8 * 4 + 1, 1 + 1 + 8 * 5 + 1)


def test_an_unseen_tile_reads_nothing_but_may_write():
    zeros = loop("STG.E desc[UR6][R4.64], RZ", label=1)
    text = f"@P6 EXIT\n@P6 BRA `(.L_x_7)\n{loop('LDG.E R3, desc[UR6][R4.64]')}EXIT\n.L_x_7:\n{zeros}EXIT"
    interior, edge, unseen = counts(text)
    assert interior == edge == 2 + 1 + 8 * 4 + 1
    assert unseen == 2 + 1 + 8 * 4 + 1
    assert code(text).paths(HEADS).unseen.counts["store"] == 8


def test_loops_in_loops_multiply():
    inner = loop("LDG.E R3, desc[UR6][R4.64]", trips=3, label=1)
    found = code(loop(inner + "FADD R1, R1, R2", trips=4, label=2) + "EXIT")
    path = found.paths(HEADS).interior
    assert path.counts["load"] == 12
    assert path.counts["fp32"] == 4
    assert path.reading == 4 * 3 + 4
    assert [each.trips for each, _ in found.inner_loops()] == [3]


def test_code_that_is_not_reached_and_branches_of_diverged_warps_are_not_counted():
    trap = "CALL.REL.NOINC `($__internal_0_$trap)"
    text = f"BRA.DIV UR4, `(.L_x_3)\n{trap}\nEXIT\n.L_x_3:\nNOP\nNOP\nEXIT\n.L_x_4:\nBRA `(.L_x_4)"
    assert counts(text) == (3, 3, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (".L_x_0:", "not the text of nvdisasm"),
        ("BRX R4, 0x10\nEXIT", "BRX: a branch to an address that is not in the code"),
        ("@P0 BRA `(.L_x_1)\n.L_x_0:\nNOP\n.L_x_1:\nNOP\n@P1 BRA `(.L_x_0)\nEXIT", "a loop with two entries"),
    ],
)
def test_what_cannot_be_counted_is_an_error(text, message):
    with pytest.raises(SassError, match=message):
        code(text)


def test_instructions_are_counted_in_their_class():
    examples = {
        "tensor": "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
        "exp": "MUFU.EX2 R1, R2",
        "fp32": "@P1 FFMA R1, R2, R3, R4",
        "half": "HADD2 R1, R2, R3",
        "convert": "HADD2.F32 R1, -RZ, R2.H0_H0",
        "select": "FMNMX R1, R2, R3, !PT",
        "shuffle": "SHFL.BFLY PT, R1, R2, 0x2, 0x1f",
        "shared": "LDSM.16.M88 R1, [R2]",
        "load": "LDG.E.128 R4, desc[UR6][R2.64]",
        "store": "STG.E.64 desc[UR6][R2.64], R4",
        "spill": "LDL R1, [R1+0x8]",
        "barrier": "BAR.SYNC.DEFER_BLOCKING 0x0",
        "move": "IMAD.MOV.U32 R1, RZ, RZ, R2",
        "integer": "LEA.HI.X R1, R2, R3, R4, 0x2, P0",
        "control": "EXIT",
        "other": "VOTE.ANY R1, PT, P0",
    }
    assert {name: Instruction.parse(text).kind for name, text in examples.items()} == {name: name for name in CLASSES}
    assert Instruction.parse("LDGDEPBAR").kind == "barrier"


def test_a_product_with_its_first_operand_in_registers_is_found():
    shared = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspB, R24 ;"
    registers = "HGMMA.64x64x16.F32 R24, R4, gdesc[UR4], R24, gsb0 ;"
    assert products_with_a_in_registers(shared) == []
    assert len(products_with_a_in_registers(f"{shared}\n{registers}")) == 1
