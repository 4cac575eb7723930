"""Provides the tasks that a run can train, each as a `Task`."""

from moe.config import ConfigError, RunConfig
from moe.tasks.fill_in_the_middle import fill_in_the_middle
from moe.tasks.language_modelling import language_modelling
from moe.tasks.masked_tokens import masked_tokens
from moe.tasks.span_corruption import span_corruption
from moe.tasks.task import Task

__all__ = ["Task", "choose_task", "make_task"]


def make_task(config: RunConfig) -> Task:
    """Returns the task that `config.task` names.

    Raises ConfigError for a custom task, since only the program that trains it has one.
    """
    match config.task:
        case "language_modelling":
            return language_modelling(config)
        case "fill_in_the_middle":
            return fill_in_the_middle(config)
        case "masked_tokens":
            return masked_tokens(config)
        case "span_corruption":
            return span_corruption(config)
        case "custom":
            raise ConfigError(
                "config.task='custom' needs a Task from the program that trains the run: "
                "pass it as task=..., or set config.task to 'language_modelling'"
            )


def choose_task(config: RunConfig, task: Task | None) -> Task:
    """Returns the caller's own task if the config says "custom", and otherwise the config's task.

    Raises ConfigError where a task is missing, or where the config names another one: a run's
    saved config must name the task that it was trained on.
    """
    if task is None:
        return make_task(config)
    if config.task != "custom":
        raise ConfigError(
            f"config.task={config.task!r} names a task, and the program passes one of its own: "
            "set config.task to 'custom'"
        )
    return task
