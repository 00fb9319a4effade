"""Where tokens come from, in which order, and how shards are read."""

from __future__ import annotations

from dataclasses import dataclass, field

from dcscale.config.schema.limits import COUNT, NOT_NEGATIVE, POSITIVE, Range, choice, number


@dataclass
class DataSource:
    """One source of a mixture."""

    name: str = ""
    """Name in metrics and messages: letters, digits and ``._-``."""

    path: str = ""
    """Its shards, as ``data.train`` names them."""

    weight: float = 1.0
    """Its share of the sequences, relative to the other weights."""


@dataclass
class DataConfig:
    """Where tokens come from and in which order."""

    train: str = ""
    """Folder of training shards, with their ``manifest.json`` (made by ``tools/make_shards.py``), or its address:
    ``http://``, ``https://``, ``s3://``, ``gs://``. ``part-{00..15}/train``, ``{a,b}/train`` and, but on web servers,
    ``*/train`` read several folders as one. Empty where ``data.sources`` says what to mix."""

    sources: list[DataSource] = field(default_factory=list)
    """Sources to mix instead of one folder. A source that comes to its end begins again, whatever the others do. One
    item is changed by, for example, ``data.sources[0].weight=0.5``."""

    validation: str | None = None
    """Folder of held-out shards, named as in ``train``; null for no validation. Any defect in them stops the run."""

    sequence_length: int = number(1024, Range(2))
    """Tokens a sequence, as the model sees them."""

    shuffle_shards: int = number(8, COUNT)
    """Shards whose documents are shuffled together (the window of the shuffle).
    More mixes better and holds more in memory."""

    slots: int = number(48, COUNT)
    """Independent read positions over an epoch. Fixed for a run: changing it changes the order.
    Best a multiple of ranks."""

    document_mask: bool = True
    """Attention and targets stop at document bounds; false lets a sequence's documents see each other."""

    prefetch_steps: int = number(4, NOT_NEGATIVE)
    """Optimizer steps whose batches are prepared ahead in a background thread; 0 prepares them in the training loop.
    With ``workers`` at least so many; they hand over groups of steps."""

    workers: int = number(0, NOT_NEGATIVE)
    """Processes a rank that prepare its batches, where one thread beside the training loop cannot keep up; 0 for that
    thread. Any number gives the same batches. Best such that ranks * workers divides ``slots``, or more is read."""

    verify: bool = True
    """Check every shard's SHA-256 against the manifest when it is read."""

    on_error: str = choice("fail", "skip")
    """What a training shard that cannot be used does: ``fail`` stops the run. ``skip`` reports it, puts masked padding
    in its place, which moves no sequence outside its window, and does not try it again, also after a resume."""

    max_skipped: float = number(0.001, Range(0, 1))
    """Largest part of a source's tokens that may be lost by ``skip``; beyond it the run stops."""

    read_ahead: int | None = number(None, NOT_NEGATIVE)
    """Windows, of ``shuffle_shards`` shards each, that a reader reads before a sequence needs them, beside those in
    use; null is as many as these, so that no reading shows where all positions change their window at once."""

    read_threads: int = number(8, COUNT)
    """Shards a reader (a rank, or each of its ``workers``) reads at once."""

    timeout_seconds: float = number(30.0, POSITIVE)
    """Seconds in which a server must take a connection, and send some byte of an answer; else it is tried again."""

    retry_backoff_seconds: float = number(1.0, POSITIVE)
    """Seconds before the second try of a read that failed in a way that may pass, at most; doubled with each further
    try up to 60, and drawn at random below that."""

    retry_total_seconds: float = number(600.0, POSITIVE)
    """Seconds that reading a shard may take with all its tries, before it counts as one that cannot be used."""

    cache: str | None = None
    """Folder on a local disk that keeps shards read from servers, for all processes of the machine; null for none."""

    cache_bytes: int = number(1 << 36, COUNT)
    """Bytes of that folder, at most; the shards unused for the longest are removed."""

    @property
    def roots(self) -> list[str]:
        """Where the training shards lie."""
        return [source.path for source in self.sources] or [self.train]
