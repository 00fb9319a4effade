"""Manifests for tars that have none, such as those of others."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dcscale.data.errors import DataError
from dcscale.data.prepare.inspect import Survey, survey_shards
from dcscale.data.shards.manifest import DTYPES, MANIFEST_NAME, SHARD_NAME, Manifest, TextInfo, write_manifest
from dcscale.data.shards.shard import TOKEN_KINDS, type_of_tokens
from dcscale.data.shards.tar import read_samples
from dcscale.data.storage import LocalStorage
from dcscale.data.tokenizers import TOKENIZER_NAME, load_tokenizer


def write_manifest_for(
    folder: Path,
    tars: Sequence[Path],
    *,
    tokenizer: str,
    eos_token: str | None = None,
    text_member: str | None = None,
    text_field: str = "text",
    workers: int = 1,
    progress: bool = False,
) -> Survey:
    """Write the manifest of tars that have none, and put the tokenizer beside it.

    Tars of tokens must be as :mod:`dcscale.data.shards.manifest` says; tars of text are described in
    :mod:`dcscale.data.shards.text`.

    Args:
        folder: where the manifest is to lie; the tars lie in it or below.
        tars: the tars.
        tokenizer: what made the tokens, or is to make them; see :func:`dcscale.data.tokenizers.load_tokenizer`.
        eos_token: its token that ends a document, see there.
        text_member: take the text from ``txt`` or ``json`` members; None takes tokens if the first tar has them, else
            ``txt`` if it has that, else ``json``.
        text_field: field of the object in a ``json`` member.
        workers: processes; each holds a tar.
        progress: show a progress bar.

    Raises:
        DataError: there is a manifest or another tokenizer already, or no manifest can be written for some tar.
    """
    if (folder / MANIFEST_NAME).exists():
        raise DataError(f"{folder / MANIFEST_NAME}: exists already; to write another one, remove it first")
    names = [tar.relative_to(folder).as_posix() for tar in tars]
    if odd := [name for name in names if not re.fullmatch(SHARD_NAME[0], name)]:
        raise DataError(f"{folder}: {len(odd)} tars such as {odd[0]!r} have a name that is not {SHARD_NAME[1]}; rename")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{folder / twice}: is given twice, so its text would be trained on twice; name it once")
    if not names:
        raise DataError(f"{folder}: holds no file that ends in .tar; give the folder of the tars")
    loaded = load_tokenizer(tokenizer, eos_token)
    beside = folder / TOKENIZER_NAME
    had_tokenizer = beside.exists()
    if had_tokenizer and hashlib.sha256(beside.read_bytes()).hexdigest() != loaded.fingerprint:
        raise DataError(f"{beside}: is not the tokenizer {tokenizer}; give this one, or remove the file")
    first = LocalStorage(folder)
    dtype, text = _content_of(first.where(names[0]), first.read(names[0]), text_member, text_field, loaded.vocab_size)
    try:
        head = Manifest(dtype, loaded.save(folder), 0, (), text=text)
        shards = survey_shards(folder, head, names, workers, progress)
        defects = [defect for shard in shards for defect in shard.defects]
        manifest = replace(
            head,
            max_token_id=max(shard.max_token_id for shard in shards),
            shards=tuple(shard.info for shard in shards if shard.info),
        )
        if not defects:
            write_manifest(folder, manifest)
    finally:
        if not had_tokenizer and not (folder / MANIFEST_NAME).exists():
            beside.unlink(missing_ok=True)
    return Survey(str(folder), manifest, shards, defects)


def _content_of(
    path: str, data: bytes, member: str | None, text_field: str, vocab_size: int
) -> tuple[str, TextInfo | None]:
    """(type of the tokens, where the text lies) in tars of which this is one."""
    kinds = {kind for sample in read_samples(path, data) for kind in sample.members}
    if member is None and kinds & set(TOKEN_KINDS):
        dtype = type_of_tokens(path, data)
        if dtype not in DTYPES:
            raise DataError(
                f"{path}: its tokens are {dtype}, but must be {' or '.join(DTYPES)}; write them again as one of these"
            )
        return dtype, None
    member = member or next((kind for kind in ("txt", "json") if kind in kinds), None)
    if member is None:
        raise DataError(
            f"{path}: its samples have {', '.join(sorted(kinds)) or 'no members'}, but must have tokens.npy, npy, txt "
            f"or json; give tars of tokens or text"
        )
    return "uint16" if vocab_size <= 1 << 16 else "uint32", TextInfo(member, text_field if member == "json" else "")
