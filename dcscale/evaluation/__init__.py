"""Evaluation of trained models of any format: loss on shards and texts, accuracy on in-context tasks.

:mod:`loading <dcscale.evaluation.loading>` finds and loads a model; :mod:`shards <dcscale.evaluation.shards>`,
:mod:`text <dcscale.evaluation.text>` and :mod:`tasks <dcscale.evaluation.tasks>` measure it.
"""

from dcscale.evaluation.loading import TrainedModel, open_trained
from dcscale.evaluation.results import LossResult
from dcscale.evaluation.shards import evaluate_shards, open_shards
from dcscale.evaluation.tasks import Accuracy, evaluate_tasks, read_tasks
from dcscale.evaluation.text import evaluate_text, read_text

__all__ = [
    "Accuracy",
    "LossResult",
    "TrainedModel",
    "evaluate_shards",
    "evaluate_tasks",
    "evaluate_text",
    "open_shards",
    "open_trained",
    "read_tasks",
    "read_text",
]
