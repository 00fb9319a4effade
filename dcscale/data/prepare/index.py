"""Write manifests for tars that have none, such as those made by other tools."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dcscale.data.bad_rows import SkippedRows, check_policy
from dcscale.data.errors import DataError
from dcscale.data.prepare.inspect import Inspection, measure_shards
from dcscale.data.shards.manifest import (
    DTYPES,
    MANIFEST_NAME,
    SHARD_NAME,
    Manifest,
    TextInfo,
    token_dtype,
    write_manifest,
)
from dcscale.data.shards.repeated import find_repeated
from dcscale.data.shards.shard import TOKEN_EXTENSIONS, detect_token_dtype
from dcscale.data.shards.tar import read_samples
from dcscale.data.storage import LocalStorage
from dcscale.data.tokenizers import TOKENIZER_NAME, load_tokenizer


def index_tars(
    folder: Path,
    tars: Sequence[Path],
    *,
    tokenizer: str,
    eos_token: str | None = None,
    text_member: str | None = None,
    text_field: str = "text",
    on_bad_row: str = "fail",
    max_bad_rows: float = 0.01,
    workers: int = 1,
    progress: bool = False,
) -> Inspection:
    """Write the manifest of tars that have none, and copy the tokenizer next to it.

    Tars of tokens must have the format of :mod:`dcscale.data.shards.manifest`, tars of text that of
    :mod:`dcscale.data.shards.text`.

    Args:
        folder: folder of the manifest; the tars are in it or in its subfolders.
        tars: the tars.
        tokenizer: tokenizer that made the tokens, or that tokenizes the text; see
            :func:`dcscale.data.tokenizers.load_tokenizer`.
        eos_token: its token that ends a document, see ``load_tokenizer``.
        text_member: read the text from ``txt`` or ``json`` members; None reads tokens if the first tar has them, else
            ``txt`` if it has that, else ``json``.
        text_field: field of the object in a ``json`` member that holds the text.
        on_bad_row: ``fail`` takes a sample whose text cannot be used for a defect, ``skip`` leaves it out whenever the
            shards are read, see :mod:`dcscale.data.bad_rows`.
        max_bad_rows: with ``skip``, the fraction of the samples that may be bad; 100 always may.
        workers: number of processes; each holds one tar in memory.
        progress: show a progress bar.

    Returns:
        What the tars hold. If it has defects, no manifest was written.

    Raises:
        DataError: there is a manifest or another tokenizer already, an argument or a name of a tar is invalid, the
            first tar holds neither tokens nor text, or too many samples are bad.
    """
    check_policy(on_bad_row, max_bad_rows)
    if (folder / MANIFEST_NAME).exists():
        raise DataError(f"{folder / MANIFEST_NAME}: already exists; to write another one, remove it first")
    names = [tar.relative_to(folder).as_posix() for tar in tars]
    if invalid := [name for name in names if not re.fullmatch(SHARD_NAME[0], name)]:
        raise DataError(
            f"{folder}: {len(invalid)} tars such as {invalid[0]!r} have a name that is not {SHARD_NAME[1]}; rename them"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{folder / twice}: is given twice, so its text would be trained on twice; name it once")
    if not names:
        raise DataError(f"{folder}: contains no file that ends in .tar; give the folder of the tars")
    loaded = load_tokenizer(tokenizer, eos_token)
    tokenizer_file = folder / TOKENIZER_NAME
    had_tokenizer = tokenizer_file.exists()
    if had_tokenizer and hashlib.sha256(tokenizer_file.read_bytes()).hexdigest() != loaded.fingerprint:
        raise DataError(f"{tokenizer_file}: is not the tokenizer {tokenizer}; give this one, or remove the file")
    storage = LocalStorage(folder)
    first, data = storage.location(names[0]), storage.read(names[0])
    dtype, text = _content_of(first, data, text_member, text_field, loaded.vocab_size)
    try:
        # Saves the tokenizer before the tars are read, since workers load it from the folder.
        skipped_rows = {} if on_bad_row == "skip" else None
        header = Manifest(dtype, loaded.save(folder), 0, (), text=text, skipped_rows=skipped_rows)
        shards = measure_shards(folder, header, names, workers, progress)
        skipped = SkippedRows()
        for name, shard in zip(names, shards):
            good = shard.info.documents if shard.info else 0
            skipped.add(good, shard.bad_rows, dict.fromkeys(shard.bad_rows, storage.location(name)))
        skipped.check(max_bad_rows)
        defects = [defect for shard in shards for defect in shard.defects]
        manifest = replace(
            header,
            max_token_id=max(shard.max_token_id for shard in shards),
            shards=tuple(shard.info for shard in shards if shard.info),
            skipped_rows=dict(sorted(skipped.by_reason.items())) or None,
        )
        if not defects:
            repeated = find_repeated([(storage, manifest)])
            defects = [
                f"{shards}: are the same, so would be trained on twice; remove one of them" for shards in repeated
            ]
        if not defects:
            write_manifest(folder, manifest)
    finally:
        if not had_tokenizer and not (folder / MANIFEST_NAME).exists():
            tokenizer_file.unlink(missing_ok=True)
    return Inspection(str(folder), manifest, shards, defects)


def _content_of(
    path: str, data: bytes, member: str | None, text_field: str, vocab_size: int
) -> tuple[str, TextInfo | None]:
    """(type of the tokens, which member holds the text or None for tokens), decided by one of the tars."""
    extensions = {extension for sample in read_samples(path, data) for extension in sample.members}
    if member is None and extensions & set(TOKEN_EXTENSIONS):
        dtype = detect_token_dtype(path, data)
        if dtype not in DTYPES:
            raise DataError(
                f"{path}: its tokens are {dtype}, but must be {' or '.join(DTYPES)}; write them again as one of these"
            )
        return dtype, None
    member = member or next((extension for extension in ("txt", "json") if extension in extensions), None)
    if member is None:
        raise DataError(
            f"{path}: its samples have {', '.join(sorted(extensions)) or 'no members'}, but must have tokens.npy, npy, "
            f"txt or json; give tars of tokens or text"
        )
    return token_dtype(vocab_size), TextInfo(member, text_field if member == "json" else "")
