"""What the environment of all tests is, and the tiny data that many of them share."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

# As launch/train.py sets it; torch, which reads it once, prints C++ backtraces of lost connections otherwise.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it once, when the first module imports it
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

LONGEST_FIRST = (
    "cluster/test_slurm.py",
    "cluster/test_job.py",
    "end_to_end/test_launchers.py",
    "ops/compose/test_triton_aot.py",
    "distributed/test_elastic_resume.py",
    "data/stream/test_elastic.py",
    "distributed/test_exact_resume.py",
    "ops/compose/test_triton_self_test.py",
    "ops/compose/test_compose_triton.py",
    "ops/compose/test_triton_errors.py",
    "distributed/test_data_faults.py",
    "distributed/test_mixture_runs.py",
    "distributed/test_failures.py",
    "data/prepare/test_resume_build.py",
    "end_to_end/test_bench_attention.py",
    "distributed/test_skips_and_rollbacks.py",
)
"""Files of more than 25 s: a worker that began one of them last would work alone in the end."""

os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1"  # servers that tests start are on this machine


def pytest_collection_modifyitems(items):
    """Sorts the files of :data:`LONGEST_FIRST` to the front, where workers take them in the order of collection."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST_FIRST)}
    missing = [str(path) for path in places if not path.exists()]
    if missing:
        raise pytest.UsageError(f"LONGEST_FIRST in tests/conftest.py names what is not there: {', '.join(missing)}")
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Folder with ``train`` and ``validation`` shards of bytes, a few dozen sequences of 32; only to be read."""
    from dcscale.testing.runs import make_shards

    return make_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session")
def llama_tokenizer(tmp_path_factory):
    """A tokenizer.json like Llama's: a space before every text, and bytes for characters that it does not know."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    library = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    text = ["Ann has a kind of fruit.", "Tom has a plum.", "the river is a stream of water."] * 3
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # while training: no tokens of two words
    library.train_from_iterator(text, trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False))
    library.pre_tokenizer = None
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    path = tmp_path_factory.mktemp("llama") / "tokenizer.json"
    library.save(str(path))
    return path


class SmallDisk:
    """A disk of 256 KiB at ``folder``."""

    def __init__(self, folder):
        self.folder = folder

    def fill(self):
        """Takes all the space that is left."""
        with open(self.folder / "filling", "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 10))

    def make_room(self):
        (self.folder / "filling").unlink()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no permission to mount a small disk: {mounted.stderr.strip()}")
    yield SmallDisk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def quick_interpreter():
    """Halves the time of interpreted Triton kernels."""
    from dcscale.testing.staged import quicken_interpreter

    quicken_interpreter()
