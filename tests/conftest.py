"""What the environment of all tests is, and the tiny data that many of them share."""

import contextlib
import os
import subprocess

import pytest

# As launch/train.py sets it; torch, which reads it once, prints C++ backtraces of lost connections otherwise.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it once, when the first module imports it
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1"  # servers that tests start are on this machine


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
