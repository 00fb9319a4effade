"""Patterns that name several roots: ``data/part-{00..15}/train``, ``{web,books}/train``, ``data/*/train``."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence

from braceexpand import UnbalancedBracesError, braceexpand

from dcscale.data.errors import DataError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def scheme_of(root: str) -> str | None:
    """``http`` of ``http://...`` and the like; None for a path."""
    found = _SCHEME.match(root)
    return found[1] if found else None


def shown(root: str) -> str:
    """A root as messages name it: without credentials, and without a query, which may hold some."""
    scheme = scheme_of(root)
    if scheme is None:
        return root
    place, query, _ = root.partition("?") if scheme in ("http", "https") else (root, "", "")
    return re.sub(r"(?<=://)[^/]*@", "", place) + (query and "?...")


def expand(root: str, glob_objects: Callable[[str], Sequence[str]]) -> list[str]:
    """The roots that a pattern names: those of braces in the order in which they are written, those of ``*``, ``?`` and
    ``[...]`` sorted; a root without any of these, or a folder of exactly that name, is its own.

    Args:
        root: a path or an address.
        glob_objects: finds folders of an object store, see :meth:`dcscale.data.sources.objects.ObjectSource.glob`.

    Raises:
        DataError: nothing is there, the braces do not match, or ``*`` is used where folders cannot be listed.
    """
    scheme = scheme_of(root)
    if scheme is None and os.path.isdir(root):
        return [root]
    try:
        written = list(braceexpand(root))
    except UnbalancedBracesError as error:
        raise DataError(
            f"{shown(root)}: the braces do not match; write them as in part-{{00..15}} or {{a,b}}"
        ) from error
    roots: list[str] = []
    for one in written:
        found = [one]
        if scheme in ("http", "https"):
            if glob.has_magic(re.sub(r"^[^/]*//[^/]*", "", re.split(r"[?#]", one)[0])):  # [::1] may be the host
                raise DataError(
                    f"{shown(one)}: * and [ cannot be used here, since a web server does not list its folders; name "
                    f"them, as in part-{{00..15}}"
                )
        elif glob.has_magic(one):
            found = sorted(glob_objects(one)) if scheme else sorted(filter(os.path.isdir, glob.glob(one)))
            if not found:
                raise DataError(f"{one}: no folder has such a name; check the pattern")
        roots += found
    for number, one in enumerate(roots):
        if one.rstrip("/") in [other.rstrip("/") for other in roots[:number]]:
            raise DataError(
                f"{shown(root)}: names {shown(one)} twice, so its data would be trained on twice; name it once"
            )
    return roots
