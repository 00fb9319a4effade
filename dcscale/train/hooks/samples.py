"""Text the model writes while it trains."""

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
    """Continues each prompt every ``interval`` steps and when the run is complete, into TensorBoard.

    All ranks generate the same text together: under ZeRO-3 none could alone.

    Raises:
        DataError: the tokenizer makes no tokens of a prompt.
    """

    name = "samples"

    def __init__(self, config: SamplesConfig, tokenizer: Tokenizer, seed: int):
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._prompt_ids = [tokenizer.encode(prompt) for prompt in config.prompts]
        for prompt, ids in zip(config.prompts, self._prompt_ids):
            if not ids:
                raise DataError(
                    f"samples.prompts has {prompt!r}, of which the tokenizer {tokenizer.spec} makes no tokens, but a "
                    f"prompt needs at least one; give another text, or set samples.interval=0"
                )
        self._done_at = -1
        self.last: str = ""
        """First prompt with its latest continuation."""

    def after_step(self, trainer: Trainer) -> None:
        if due(trainer.state.step, self._config.interval):
            self._sample(trainer)

    def finish(self, trainer: Trainer, completed: bool) -> None:
        if completed and self._done_at != trainer.state.step:
            self._sample(trainer)

    def _sample(self, trainer: Trainer) -> None:
        config, step = self._config, trainer.state.step
        with trainer.engine.evaluating():
            written = generate(
                trainer.engine.module,
                self._prompt_ids,
                new_tokens=config.new_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=self._seed,
                stop_id=self._tokenizer.eos_id,
            )
        texts = [prompt + self._tokenizer.decode(ids) for prompt, ids in zip(config.prompts, written)]
        self._done_at, self.last = step, texts[0]
        for number, text in enumerate(texts):
            # The browser must show the model's text, not interpret it.
            trainer.report_text(f"samples/prompt_{number}", f"<pre>{html.escape(text)}</pre>")

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        return {"sample": self.last or None}

    def state_dict(self) -> dict[str, Any]:
        return {"done_at": self._done_at, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done_at, self.last = state["done_at"], state["last"]
