"""What can be trained, each a `Task`."""

from moe.config import ConfigError, RunConfig
from moe.tasks.language_modelling import language_modelling
from moe.tasks.task import Task

__all__ = ["Task", "make_task", "task_of_run"]


def make_task(config: RunConfig) -> Task:
    """Returns the task that `config.task` names. Raises ConfigError for a custom one."""
    match config.task:
        case "language_modelling":
            return language_modelling(config)
        case "custom":
            raise ConfigError(
                "config.task='custom' needs a Task from the program that trains the run: "
                "pass it as task=..., or set config.task to 'language_modelling'"
            )


def task_of_run(config: RunConfig, task: Task | None) -> Task:
    """Returns the caller's own task for a run of a custom one, and otherwise the config's.

    Raises ConfigError where a task is missing, or where the config names another one. A run's
    saved config then never names a task that the run was not trained on.
    """
    if task is None:
        return make_task(config)
    if config.task != "custom":
        raise ConfigError(
            f"config.task={config.task!r} names a task, and the program passes one of its own: "
            "set config.task to 'custom'"
        )
    return task
