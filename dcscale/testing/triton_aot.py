"""Compile the kernels ahead of time, without a GPU: python -m dcscale.testing.triton_aot 80 90 100 --ranks 2 4

Prints JSON with, for each compute capability, rank and kernel, the registers of a thread, the bytes that a thread
spills to local memory, and the shared memory of a program in bytes, as ptxas reports them. TRITON_INTERPRET=1 must not
be set.
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
from dcscale.ops.compose.triton.staging import REDUCE_BLOCK
from dcscale.ops.compose.triton.tiles import Tile, tiles_for

HEADS = 32
_STEPS = {
    "scores to logits": kernels.SCORES_TO_LOGITS.value,
    "scores to probabilities": kernels.SCORES_TO_PROBABILITIES.value,
    "logits to composed": kernels.LOGITS_TO_COMPOSED.value,
}


def variants(capability: int, rank: int) -> dict[str, tuple[Any, Tile, dict[str, Any]]]:
    """(kernel, tile, constants) of every variant, by name, with all weights and as in bfloat16 training."""
    tiles = tiles_for(capability, rank)
    weights = {"HEADS": HEADS, "QUERY_RANK": rank, "QUERY_GATE": 1, "KEY_RANK": rank, "KEY_GATE": 1}
    found = {}
    for name, step in _STEPS.items():
        # Only the backward pass recomputes probabilities, and only pre applies the mask.
        tile = tiles.backward if name == "scores to probabilities" else tiles.forward
        documents = name != "logits to composed"
        found[name] = (kernels.compose_forward, tile, {**weights, "STEP": step, "DOCUMENTS": documents})
    for name, post in (("backward of post", True), ("backward of pre", False)):
        found[name] = (kernels.compose_backward, tiles.backward, {**weights, "POST": post})
    reduction = Tile(1, REDUCE_BLOCK, 4)  # 4 warps are Triton's default
    found["statistics"] = (kernels.finish_statistics, reduction, {"HEADS": HEADS, "BLOCK": REDUCE_BLOCK})
    found["partial sums"] = (kernels.reduce_partials, reduction, {"ADD": True, "BLOCK": REDUCE_BLOCK})
    return found


def resources(capability: int, kernel: Any, tile: Tile, constants: dict[str, Any]) -> dict[str, int]:
    """Registers per thread, spilled bytes per thread and shared memory in bytes of one variant."""
    blocks = {"BLOCK_T": tile.queries, "BLOCK_S": tile.keys}
    constants = {**constants, **{name: size for name, size in blocks.items() if name in kernel.arg_names}}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else _type(name, constants)
        # As at run time: torch aligns its tensors, and rows are padded to a multiple of the tile's keys.
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
    """The Triton type of an argument, as dcscale.ops.compose.triton.staging passes it for bfloat16 input."""
    if name == "out_ptr":
        return {
            kernels.SCORES_TO_LOGITS.value: "*fp32",
            kernels.SCORES_TO_PROBABILITIES.value: "*fp16",
            kernels.LOGITS_TO_COMPOSED.value: "*bf16",
        }[constants["STEP"]]
    if name == "probabilities_ptr" or (name == "x_ptr" and constants.get("POST")):
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
    print(json.dumps({"triton": triton.__version__, "assembler": _ptxas_version(), "kernels": report}, indent=1))


def _ptxas_version() -> str:
    path = Path(triton.knobs.nvidia.ptxas.path)
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]


if __name__ == "__main__":
    main()
