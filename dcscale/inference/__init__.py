"""What is done with a trained model: loading it from any format, and measuring what it predicts.

:mod:`trained <dcscale.inference.trained>` finds and loads it; :mod:`shards <dcscale.inference.shards>`,
:mod:`text <dcscale.inference.text>` and :mod:`tasks <dcscale.inference.tasks>` measure.
"""

from dcscale.inference.losses import Losses
from dcscale.inference.shards import evaluate_shards, open_shards
from dcscale.inference.tasks import Accuracy, evaluate_tasks, read_tasks
from dcscale.inference.text import evaluate_text, read_text
from dcscale.inference.trained import Trained, open_trained

__all__ = [
    "Accuracy",
    "Losses",
    "Trained",
    "evaluate_shards",
    "evaluate_tasks",
    "evaluate_text",
    "open_shards",
    "open_trained",
    "read_tasks",
    "read_text",
]
