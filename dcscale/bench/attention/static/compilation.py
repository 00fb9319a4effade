"""Compiles Triton kernels ahead of time, without a GPU, as a launch with the same arguments would."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Binary:
    """A compiled kernel."""

    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread in local memory."""
    shared: int
    """Bytes of shared memory of a program."""
    warps: int
    cubin: bytes

    @cached_property
    def sass(self) -> str:
        """Text of nvdisasm."""
        # Inferring the targets of indirect branches, of which there are none, takes a third of its time.
        return _run_on(self.cubin, triton.knobs.nvidia.nvdisasm.path, "-c", "--no-dataflow")


class Compiler:
    """Compiles for the compute capability ``arch`` (10 * major + minor), each variant of a kernel once."""

    def __init__(self, arch: int):
        self.arch = arch
        self._done: dict[str, Binary] = {}

    def __call__(
        self,
        kernel: Any,
        arguments: Mapping[str, Tensor | float | None],
        constants: Mapping[str, Any],
        warps: int,
        stages: int,
    ) -> Binary:
        """The compiled kernel.

        Args:
            kernel: function under ``triton.jit``; with TRITON_INTERPRET=1 there is none that can be compiled.
            arguments: by name; of tensors, which may be on the meta device, the dtype counts.
            constants: of the parameters that are ``tl.constexpr``.
            warps: of a program.
            stages: of its pipelined loops.
        """
        source = _source(kernel, arguments, constants)
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        variant = f"{kernel.__name__} {source.signature} {source.attrs} {source.constants} {options}"
        if variant not in self._done:
            compiled = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
            self._done[variant] = _binary(compiled.asm["cubin"], compiled.metadata.shared, warps)
        return self._done[variant]


def versions() -> dict[str, str]:
    """Versions of Triton and of its assembler."""
    text = _run(triton.knobs.nvidia.ptxas.path, "--version")
    return {"triton": triton.__version__, "ptxas": re.search(r"release ([\d.]+)", text).group(1)}


def _source(kernel: Any, arguments: Mapping[str, Tensor | float | None], constants: Mapping[str, Any]) -> ASTSource:
    """The kernel with the types of its arguments, as Triton finds them in a launch."""
    signature, attributes, constants = {}, {}, dict(constants)
    for position, parameter in enumerate(kernel.params):
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
            continue
        value = arguments[parameter.name]
        # As at run time, None and 1 are constants, and divisibility by 16 is part of the type. torch aligns tensors.
        if value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = _type(value)
        aligned = isinstance(value, Tensor) or (
            type(value) is int and value % 16 == 0 and not parameter.do_not_specialize
        )
        if aligned and not parameter.do_not_specialize_on_alignment:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _binary(cubin: bytes, shared: int, warps: int) -> Binary:
    resources = _run_on(cubin, triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    return Binary(used["REG"], used["STACK"] + used["LOCAL"], shared, warps, cubin)


def _type(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _run(program: str | Path, *arguments: str) -> str:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def _run_on(content: bytes, program: str | Path, *arguments: str) -> str:
    """What a program prints about a file with this content."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return _run(program, *arguments, file.name)
