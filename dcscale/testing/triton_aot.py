"""Compiles the kernels for GPUs that need not be there: python -m dcscale.testing.triton_aot 80 90 100 --ranks 2 4

Prints JSON: for each compute capability, rank and kernel the registers of a thread, the bytes that a thread spills to
local memory, and the bytes of shared memory of a program, as the assembler made them. Not for TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dcscale.ops.compose.triton import kernels
from dcscale.ops.compose.triton.staging import LANES
from dcscale.ops.compose.triton.tiles import Tile, tiles_for

HEADS = 32
_STEPS = {
    "scores to logits": kernels.SCORES_TO_LOGITS,
    "scores to probabilities": kernels.SCORES_TO_PROBABILITIES,
    "logits to mixed": kernels.LOGITS_TO_MIXED,
}


def variants(capability: int, rank: int) -> dict[str, tuple[Any, Tile, dict[str, Any]]]:
    """Kernel, tile and constants by name, with all weights there and the types of bfloat16 training."""
    tiles = tiles_for(capability, rank)
    weights = {"HEADS": HEADS, "QUERY_RANK": rank, "QUERY_GATE": 1, "KEY_RANK": rank, "KEY_GATE": 1}
    found = {}
    for name, step in _STEPS.items():
        tile = tiles.backward if step == kernels.SCORES_TO_PROBABILITIES else tiles.forward
        found[name] = (kernels.mix_forward, tile, {**weights, "STEP": step, "DOCUMENTS": step != 2})
    for name, post in (("backward of post", True), ("backward of pre", False)):
        found[name] = (kernels.mix_backward, tiles.backward, {**weights, "POST": post})
    adding = Tile(1, LANES, 4)  # warps as Triton's default
    found["statistics"] = (kernels.finish_statistics, adding, {"HEADS": HEADS, "BLOCK": LANES})
    found["sums of parts"] = (kernels.add_parts, adding, {"ADD": True, "BLOCK": LANES})
    return found


def resources(capability: int, kernel: Any, tile: Tile, constants: dict[str, Any]) -> dict[str, int]:
    """Registers, spilled bytes and shared bytes of one variant."""
    blocks = {"BLOCK_T": tile.queries, "BLOCK_S": tile.keys}
    constants = {**constants, **{name: size for name, size in blocks.items() if name in kernel.arg_names}}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else _type(name, constants)
        if signature[name].startswith("*") or name == "row_stride":
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": tile.warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"], "shared": compiled.metadata.shared}


def _type(name: str, constants: dict[str, Any]) -> str:
    """As dcscale.ops.compose.triton.staging makes them of bfloat16 input."""
    if name == "out_ptr":
        return {
            kernels.SCORES_TO_LOGITS: "*fp32",
            kernels.SCORES_TO_PROBABILITIES: "*fp16",
            kernels.LOGITS_TO_MIXED: "*bf16",
        }[constants["STEP"]]
    if name == "probabilities_ptr" or (name == "maps_ptr" and constants.get("POST")):
        return "*fp16"
    if name in ("operand_ptr", "gradient_ptr"):
        return "*bf16"
    if name == "documents_ptr":
        return "*i32"
    return "*fp32" if name.endswith("_ptr") else "i32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", nargs="+", type=int)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2])
    options = parser.parse_args()
    report = {
        f"sm_{capability}, rank {rank}": {
            name: resources(capability, *variant) for name, variant in variants(capability, rank).items()
        }
        for capability in options.capabilities
        for rank in options.ranks
    }
    print(json.dumps({"triton": triton.__version__, "assembler": _assembler(), "kernels": report}, indent=1))


def _assembler() -> str:
    path = Path(triton.knobs.nvidia.ptxas.path)
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]


if __name__ == "__main__":
    main()
