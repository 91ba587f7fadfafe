"""Long Range Arena's tasks."""

from __future__ import annotations

from chela_plugin.harness.task_configs.base import TaskConfig

TASKS: tuple[type[TaskConfig], ...] = ()
