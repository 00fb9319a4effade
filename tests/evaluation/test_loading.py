"""Loading a model from any folder gives the same as converting it first; and its tokenizer."""

import shutil

import pytest
import torch
from tokenizers import Tokenizer, models

from dcscale.convert import ConversionError, convert
from dcscale.data import ByteTokenizer, DataError
from dcscale.evaluation import open_trained
from dcscale.testing.models import UpstreamFolder, tiny_config, write_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def upstream(tmp_path):
    """An upstream folder with a tiny model."""
    convert(write_checkpoint(tmp_path / "source", tiny_config(vocab_size=257)), tmp_path / "upstream", "upstream")
    return UpstreamFolder(tmp_path / "upstream")


def test_a_folder_is_loaded_like_its_conversion(tmp_path, upstream):
    convert(upstream.folder, tmp_path / "converted", "dcscale", gelu="erf", local_keys=3)
    trained = open_trained(upstream.folder, gelu="erf", local_keys=3)
    direct, converted = trained.load(CPU), open_trained(tmp_path / "converted").load(CPU)
    assert direct.config == converted.config
    assert (direct.config.compose.gelu, direct.config.windows) == ("erf", [3, None])
    state = converted.state_dict()
    assert all(torch.equal(state.pop(name), tensor) for name, tensor in direct.state_dict().items())
    assert not state
    assert not direct.training
    assert not any(parameter.requires_grad for parameter in direct.parameters())
    assert trained.load(CPU, torch.bfloat16).norm.weight.dtype == torch.bfloat16


def test_tied_embeddings_stay_tied(tmp_path):
    trained = open_trained(write_checkpoint(tmp_path / "source", tiny_config(tied_embeddings=True)))
    model = trained.load(CPU, torch.float64)
    assert model.output.weight is model.embedding.weight
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]]))).all()


def test_description(tmp_path, upstream):
    trained = open_trained(upstream.folder)
    assert trained.description[0] == f"upstream DCFormer folder {upstream.folder}"
    assert trained.description[1].startswith("note: trained tensors of compose: original")
    assert trained.step is None
    model_folder = open_trained(tmp_path / "source")
    assert model_folder.description == [f"dcscale model folder {tmp_path / 'source'} (step 7)"]


def test_values_that_a_conversion_rejects_are_rejected(upstream):
    upstream.tensors["norm.weight"][3] = torch.nan
    with pytest.raises(ConversionError, match=r"norm\.weight  <-  norm\.weight: 1 NaN and 0 infinite of 32"):
        open_trained(upstream.write()).load(CPU)
    upstream.tensors["layers.0.attention.dyn_w_proj.pre_proj.w"] = torch.ones(1, 4, 4)
    with pytest.raises(ConversionError, match="is a static head projection"):
        open_trained(upstream.write()).load(CPU)


def test_the_tokenizer(tmp_path, upstream):
    library = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    library.save(str(tmp_path / "named.json"))
    assert isinstance(open_trained(upstream.folder).tokenizer, ByteTokenizer)
    assert open_trained(upstream.folder, tokenizer=tmp_path / "named.json").tokenizer.eos_id == 1
    assert open_trained(upstream.folder, tokenizer=tmp_path / "named.json", eos_token="a").tokenizer.eos_id == 0
    del upstream.settings["dcscale"]["tokenizer"]
    upstream.write()
    with pytest.raises(DataError, match=r"has no tokenizer\.json: name one with --tokenizer, or 'byte'"):
        assert open_trained(upstream.folder).tokenizer
    assert isinstance(open_trained(upstream.folder, tokenizer="byte").tokenizer, ByteTokenizer)

    # A tokenizer next to the model, with and without an end-of-document token in the config.
    shutil.copy(tmp_path / "named.json", upstream.folder / "tokenizer.json")
    upstream.settings["eos_token_id"] = 0
    assert open_trained(upstream.write()).tokenizer.eos_id == 0
    assert open_trained(upstream.folder, eos_token="</s>").tokenizer.eos_id == 1, "what is given wins"
    del upstream.settings["eos_token_id"]
    assert open_trained(upstream.write()).tokenizer.eos_id == 1
    assert open_trained(upstream.folder, eos_token="a").tokenizer.eos_id == 0
