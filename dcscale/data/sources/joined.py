"""Several roots as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dcscale.data.sources.base import Source


class JoinedSource(Source):
    """Roots one after another; of part i, the shard ``NAME`` is called ``i/NAME`` here. What belongs to all of them,
    such as the tokenizer, is read from the first.

    Args:
        parts: the roots, in order.
        shown: how messages name them together.
    """

    def __init__(self, parts: Sequence[Source], shown: str) -> None:
        self.parts, self._shown = list(parts), shown

    def __str__(self) -> str:
        return self._shown

    def where(self, name: str) -> str:
        part, rest = self._of(name)
        return part.where(rest) if rest != name else f"{self._shown}: {name}"

    def read(self, name: str, size: int | None = None, sha256: str | None = None) -> bytes:
        part, rest = self._of(name)
        return part.read(rest, size, sha256)

    def check(self, sizes: Mapping[str, int]) -> None:
        of_parts: dict[Source, dict[str, int]] = {}
        for name, size in sizes.items():
            part, rest = self._of(name)
            of_parts.setdefault(part, {})[rest] = size
        for part, of_part in of_parts.items():
            part.check(of_part)

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def _of(self, name: str) -> tuple[Source, str]:
        number, _, rest = name.partition("/")
        return (self.parts[int(number)], rest) if rest else (self.parts[0], name)
