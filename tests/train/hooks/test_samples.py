"""Text samples during training."""

import pytest

from dcscale.config.schema import SamplesConfig
from dcscale.data import ByteTokenizer, DataError
from dcscale.train.hooks.samples import Samples


class Stripping(ByteTokenizer):
    """A tokenizer that strips white space."""

    spec = "stripping/tokenizer.json"

    def encode(self, text):
        return super().encode(text.strip())


def test_a_prompt_without_tokens_is_rejected_before_training():
    message = (
        r"samples\.prompts contains ' ', which the tokenizer stripping/tokenizer\.json encodes to no tokens, but a "
        r"prompt needs at least one; use another prompt, or set samples\.interval=0"
    )
    with pytest.raises(DataError, match=message):
        Samples(SamplesConfig(interval=1, prompts=["def ", " "]), Stripping(), seed=0)
    Samples(SamplesConfig(interval=1, prompts=["def ", " "]), ByteTokenizer(), seed=0)


def test_state_round_trip():
    config = SamplesConfig(interval=1)
    first, second = Samples(config, ByteTokenizer(), seed=0), Samples(config, ByteTokenizer(), seed=0)
    state = {"done_at": 4, "last": "def f():"}
    first.load_state_dict(state)
    assert first.state_dict() == state
    second.load_state_dict(first.state_dict())
    assert second.last == "def f():"
