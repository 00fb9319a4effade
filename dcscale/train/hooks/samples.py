"""Text samples generated during training."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from dcscale.config.schema import SamplesConfig
from dcscale.data import DataError, Tokenizer
from dcscale.models import generate
from dcscale.train.hooks.base import Hook, due

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


class Samples(Hook):
    """Continues each prompt every ``interval`` steps and at the end of the run, and shows the text in TensorBoard.

    Raises:
        DataError: the tokenizer encodes a prompt to no tokens.
    """

    name = "samples"

    def __init__(self, config: SamplesConfig, tokenizer: Tokenizer, seed: int):
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._prompt_ids = [tokenizer.encode(prompt) for prompt in config.prompts]
        for prompt, ids in zip(config.prompts, self._prompt_ids):
            if not ids:
                raise DataError(
                    f"samples.prompts contains {prompt!r}, which the tokenizer {tokenizer.spec} encodes to no "
                    "tokens, but a prompt needs at least one; use another prompt, or set samples.interval=0"
                )
        self._last_step = -1
        self.last: str = ""
        """The first prompt with its latest continuation."""

    def after_step(self, trainer: Trainer) -> None:
        if due(trainer.state.step, self._config.interval):
            self._sample(trainer)

    def finish(self, trainer: Trainer, completed: bool) -> None:
        if completed and self._last_step != trainer.state.step:
            self._sample(trainer)

    def _sample(self, trainer: Trainer) -> None:
        config, step = self._config, trainer.state.step
        # All ranks generate the same text together: under ZeRO-3 no rank has all weights.
        with trainer.engine.evaluating():
            generated = generate(
                trainer.engine.module,
                self._prompt_ids,
                new_tokens=config.new_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=self._seed,
                stop_id=self._tokenizer.eos_id,
            )
        texts = [
            prompt + self._tokenizer.decode_continuation(prompt_ids, new_ids)
            for prompt, prompt_ids, new_ids in zip(config.prompts, self._prompt_ids, generated)
        ]
        self._last_step, self.last = step, texts[0]
        for number, text in enumerate(texts):
            # Escape the text, so that the browser shows HTML in it instead of interpreting it.
            trainer.report_text(f"samples/prompt_{number}", f"<pre>{html.escape(text)}</pre>")

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        return {"sample": self.last or None}

    def state_dict(self) -> dict[str, Any]:
        return {"done_at": self._last_step, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last_step, self.last = state["done_at"], state["last"]
