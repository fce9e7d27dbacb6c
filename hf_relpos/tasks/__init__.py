"""Synthetic tasks, one family per file; importing a file registers the tasks in it."""

from . import flip_flop, needles, passkey, string_copy  # noqa: F401
from .base import TASKS, Task, TaskRows, check_task, make_task, register_task, training_rows


__all__ = ["TASKS", "Task", "TaskRows", "check_task", "make_task", "register_task", "training_rows"]
