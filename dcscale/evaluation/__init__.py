"""What is done with a trained model: loading it from any format, and measuring what it predicts.

:mod:`trained <dcscale.evaluation.loading>` finds and loads it; :mod:`shards <dcscale.evaluation.shards>`,
:mod:`text <dcscale.evaluation.text>` and :mod:`tasks <dcscale.evaluation.tasks>` measure.
"""

from dcscale.evaluation.loading import Trained, open_trained
from dcscale.evaluation.results import Losses
from dcscale.evaluation.shards import evaluate_shards, open_shards
from dcscale.evaluation.tasks import Accuracy, evaluate_tasks, read_tasks
from dcscale.evaluation.text import evaluate_text, read_text

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
