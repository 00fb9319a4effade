"""Training data: shards, mixture, order, and how shards are read."""

from __future__ import annotations

from dataclasses import dataclass, field

from dcscale.config.schema.limits import COUNT, NOT_NEGATIVE, POSITIVE, Range, choice, location, number


@dataclass
class DataSource:
    """One source of a data mixture."""

    name: str = ""
    """Name in metrics and messages; may contain letters, digits and ``._-``."""

    path: str = location("")
    """Folder or address of its shards, like ``data.train``."""

    weight: float = 1.0
    """Share of the sequences, relative to the weights of the other sources. Two sources that have data in common are
    refused, unless both have a weight other than 1: then it is meant, and a warning says so."""


@dataclass
class DataConfig:
    """Training and validation data, their order, and how shards are read."""

    train: str = location("")
    """Folder of training shards with their ``manifest.json``, as written by ``tools/make_shards.py``, or its address:
    ``http://``, ``https://``, ``s3://``, ``gs://``. Patterns such as ``part-{00..15}/train`` and ``{a,b}/train`` read
    several folders as one, and so does ``*/train`` except on web servers; the same data may not be among them twice,
    by whatever names. Must be empty if ``data.sources`` is set."""

    sources: list[DataSource] = field(default_factory=list)
    """Sources of a mixture, instead of ``data.train``. A source that is exhausted starts its next epoch, independently
    of the others. On the command line, one item is changed with ``data.sources[0].weight=0.5``, for example."""

    validation: str | None = location(None)
    """Folder or address of held-out shards, like ``train``, none of which may be training data; null for no validation.
    Any defect in them stops the run."""

    sequence_length: int = number(1024, Range(2))
    """Tokens per sequence, as the model sees it."""

    shuffle_shards: int = number(8, COUNT)
    """Number of shards in a shuffle block: documents are shuffled within a block. More shuffles better and needs more
    memory."""

    slots: int = number(48, COUNT)
    """Number of slots: independent read positions in an epoch, among which the ranks divide the reading. Fixed for a
    run, because it determines the order. Best a multiple of the number of ranks."""

    document_mask: bool = True
    """Limit attention and targets to a document; false lets the documents in a sequence attend to each other."""

    prefetch_steps: int = number(4, NOT_NEGATIVE)
    """Optimizer steps whose batches are prefetched by a background thread; 0 prepares them in the training loop. With
    ``workers`` this is a minimum, because workers deliver groups of steps."""

    workers: int = number(0, NOT_NEGATIVE)
    """Worker processes per rank that prepare batches; 0 uses one thread of the training process. Any number gives the
    same batches. ranks * workers should divide ``slots``, otherwise shards are read more often than necessary."""

    verify: bool = True
    """Check the SHA-256 of every shard against the manifest when it is read."""

    on_error: str = choice("fail", "skip")
    """What happens if a training shard cannot be read or is corrupt: ``fail`` stops the run; ``skip`` prints a warning
    and replaces the shard by a placeholder of masked tokens, so that sequences outside its shuffle block stay the same.
    A skipped shard is not tried again, also not after a resume."""

    max_skipped: float = number(0.001, Range(0, 1))
    """Largest fraction of a source's tokens that ``skip`` may lose, in [0, 1]; beyond it the run stops."""

    read_ahead: int | None = number(None, NOT_NEGATIVE)
    """Shuffle blocks, of ``shuffle_shards`` shards each, that a reader prefetches besides those in use. null is as many
    as are in use, so that reading is hidden even if all slots move to their next block at the same time."""

    read_threads: int = number(8, COUNT)
    """Shards that a reader (a rank, or each of its ``workers``) reads concurrently."""

    timeout_seconds: float = number(30.0, POSITIVE)
    """Timeout, in seconds, for connecting to a server and for each read of a response; then the read is retried."""

    retry_backoff_seconds: float = number(1.0, POSITIVE)
    """Upper bound, in seconds, of the random wait before the first retry of a read that failed with a transient error;
    doubled for each further retry, up to 60."""

    retry_total_seconds: float = number(600.0, POSITIVE)
    """Time limit, in seconds, for reading a shard including all retries; then the shard counts as unreadable."""

    cache: str | None = location(None)
    """Folder on a local disk that caches shards read from servers, shared by all processes of the machine; null for
    none."""

    cache_bytes: int = number(1 << 36, COUNT)
    """Maximum size of the cache, in bytes; the least recently used shards are removed."""

    @property
    def roots(self) -> list[str]:
        """Folders or addresses of all training shards."""
        return [source.path for source in self.sources] or [self.train]
