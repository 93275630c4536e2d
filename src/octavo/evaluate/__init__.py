"""How good a model is: measures with standard errors, and the tasks that take them."""

from octavo.evaluate.metrics import LOWER_IS_BETTER, Measure, difference
from octavo.evaluate.outputs import Outputs
from octavo.evaluate.passes import Options
from octavo.evaluate.task import Task
from octavo.evaluate.tasks import TASKS, parse_task, parse_tasks

__all__ = [
    "LOWER_IS_BETTER",
    "TASKS",
    "Measure",
    "Options",
    "Outputs",
    "Task",
    "difference",
    "parse_task",
    "parse_tasks",
]
