"""Which implementation of plain attention runs, and the reason that is reported. Needs neither packages nor a GPU."""

import importlib
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from dcscale.ops import choose_backend, flash

attention_module = importlib.import_module("dcscale.ops.attention")  # the package's attribute is the function

USABLE = "def flash_attn_func(): ...\ndef flash_attn_varlen_func(): ..."


class OnGPU:
    """The attributes of a tensor that choose_backend reads."""

    device, dtype, shape = torch.device("cuda", 0), torch.bfloat16, (2, 9, 4, 64)


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Fakes a GPU; the returned function installs flash-attn, or a module of another package, with the given source."""
    flash._package_unavailable_reason.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(attention_module, "sdpa_backend", lambda q: "cudnn")
    modules = ("flash_attn", "flash_attn_interface")
    for module in modules:
        monkeypatch.delitem(sys.modules, module, raising=False)

    def installed(version, text=USABLE, module="flash_attn"):
        information = tmp_path / f"{module}-{version}.dist-info"
        information.mkdir()
        name = module.replace("_", "-")
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (tmp_path / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    yield installed
    flash._package_unavailable_reason.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)


@pytest.mark.parametrize("version", ["2.7", "2.7.4.post1+cu12torch2.6cxx11abiFALSE", "2.10.0"])
def test_an_installed_package_is_used(install, version):
    install(version)
    chosen, why = choose_backend("auto", OnGPU)
    assert chosen == "flash-attn"
    assert why == (
        "without compose weights this is plain attention; the fastest of those here whose gradients are the same bits "
        "in every run; not flash-attn-3: it needs compute capability 9.0, but the GPU has 8.0"
    )


def reason():
    chosen, why = choose_backend("auto", OnGPU)
    assert chosen == "sdpa cudnn"
    return why.rpartition("flash-attn: ")[2]


@pytest.fixture
def hopper(install, monkeypatch):
    """Fakes an H100; the returned function installs a flash-attn-3, whose operator exists unless it is old."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))

    def installed(text=USABLE, operator=True):
        install("3.0.0", text, module="flash_attn_interface")
        operators = SimpleNamespace(_flash_attn_forward=None) if operator else SimpleNamespace()
        monkeypatch.setattr(torch.ops, "flash_attn_3", operators, raising=False)

    return installed


def test_flash_attention_3_comes_first_on_hopper(install, hopper):
    install("2.8.3", "raise AssertionError('not to be imported')")
    hopper()
    why = "the fastest of those here whose gradients are the same bits in every run"
    assert choose_backend("auto", OnGPU) == ("flash-attn-3", f"without compose weights this is plain attention; {why}")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("package", ["flash-attn-3", "flash-attn-4"])
def test_hopper_without_the_package(package):
    assert flash.unavailable_reason(OnGPU, package).startswith(f"{package} is not installed (pip install")


def test_flash_attention_3_is_for_hopper_only(install, hopper, monkeypatch):
    install("2.8.3")
    hopper("raise AssertionError('not to be imported')")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (10, 0))
    chosen, why = choose_backend("auto", OnGPU)
    assert chosen == "flash-attn"
    assert why.endswith("not flash-attn-3: it supports compute capability 9.x at most, but the GPU has 10.0")


@pytest.mark.parametrize(
    ("text", "operator", "problem"),
    [
        (USABLE, False, "flash-attn-3 is installed, but a build of December 2025 or newer is needed"),
        ("raise ImportError('undefined symbol')", True, "importing it fails: ImportError: undefined symbol"),
    ],
)
def test_flash_attention_2_stands_in_for_an_unusable_flash_attention_3(install, hopper, text, operator, problem):
    install("2.8.3")
    hopper(text, operator)
    with pytest.warns(UserWarning, match=f"{problem}.*uses another implementation instead. Build flash-attn-3 for"):
        chosen, why = choose_backend("auto", OnGPU)
    assert chosen == "flash-attn"
    assert problem in why


def test_the_default_backend_of_pytorch_is_named(monkeypatch):
    like = torch.zeros(1, 1, 2, 8)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *tensors, is_causal: SDPBackend.CUDNN_ATTENTION.value)
    assert attention_module.sdpa_backend(like) == "cudnn"
    monkeypatch.setattr(attention_module, "current_flash_attention_impl", lambda: "FA3")
    assert attention_module.sdpa_backend(like) == "cudnn"
    monkeypatch.undo()
    assert attention_module.sdpa_backend(like) == "flash"
    monkeypatch.setattr(attention_module, "current_flash_attention_impl", lambda: "FA3")
    assert attention_module.sdpa_backend(like) == "fa3"


def test_not_installed(install, monkeypatch):
    def missing(name):
        raise flash.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(flash.importlib.metadata, "version", missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason() == "flash-attn is not installed (pip install --no-build-isolation flash-attn)"


UNDEFINED_SYMBOL = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c10')"


@pytest.mark.parametrize(
    ("version", "text", "problem"),
    [
        ("2.6.3", "raise AssertionError('not to be imported')", "flash-attn 2.6.3 is installed, but 2.7 or newer"),
        ("2.8.3", UNDEFINED_SYMBOL, "importing it fails: ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c10"),
        ("2.8.3", "raise OSError('libcudart.so.11.0')", "importing it fails: OSError: libcudart.so.11.0"),
        ("2.8.3", "", "importing it fails: ImportError: cannot import name 'flash_attn_func'"),
    ],
)
def test_an_unusable_package_is_reported_once(install, version, text, problem):
    install(version, text)
    with pytest.warns(
        UserWarning, match=rf"{problem}.*uses another implementation instead.*Build flash-attn for this PyTorch"
    ):
        assert problem in reason()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert problem in reason()


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("device", torch.device("cpu"), "it needs an NVIDIA GPU, but q is on cpu"),
        ("dtype", torch.float32, "it supports bfloat16 and float16, but q is torch.float32"),
        ("shape", (2, 9, 4, 320), r"it supports head dims up to 256, but q has shape (2, 9, 4, 320)"),
    ],
)
def test_calls_that_it_does_not_support(install, monkeypatch, name, value, problem):
    """The package is not imported for them, so there is no warning about a package that would not be used anyway."""
    install("2.8.3", UNDEFINED_SYMBOL)
    monkeypatch.setattr(OnGPU, name, value)
    assert reason() == problem


def test_gpus_that_it_does_not_support(install, monkeypatch):
    install("2.8.3", UNDEFINED_SYMBOL)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert reason() == "it needs compute capability 8.0, but the GPU has 7.5"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert reason() == "it is used on NVIDIA GPUs only, and this torch is built for ROCm"


def test_the_required_version_is_that_of_pyproject():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'"flash-attn(.*)"', project) == [f">={flash.OLDEST_VERSION}"]
