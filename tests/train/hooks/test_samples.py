"""Text the model writes while it trains."""

import pytest

from dcscale.config.schema import SamplesConfig
from dcscale.data import ByteTokenizer, DataError
from dcscale.train.hooks.samples import Samples


class Blind(ByteTokenizer):
    """Knows no spaces, as a tokenizer that strips them does."""

    spec = "blind/tokenizer.json"

    def encode(self, text):
        return super().encode(text.strip())


def test_a_prompt_without_tokens_is_refused_before_anything_is_trained():
    message = (
        r"samples\.prompts has ' ', of which the tokenizer blind/tokenizer\.json makes no tokens, but a prompt needs "
        r"at least one; give another text, or set samples\.interval=0"
    )
    with pytest.raises(DataError, match=message):
        Samples(SamplesConfig(interval=1, prompts=["def ", " "]), Blind(), seed=0)
    Samples(SamplesConfig(interval=1, prompts=["def ", " "]), ByteTokenizer(), seed=0)


def test_the_state_goes_from_one_start_to_the_next():
    config = SamplesConfig(interval=1)
    first, second = Samples(config, ByteTokenizer(), seed=0), Samples(config, ByteTokenizer(), seed=0)
    state = {"done_at": 4, "last": "def f():"}
    first.load_state_dict(state)
    assert first.state_dict() == state
    second.load_state_dict(first.state_dict())
    assert second.last == "def f():"
