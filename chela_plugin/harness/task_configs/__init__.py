"""What a task's YAML may say: one torch-free pydantic class a task, in files by family.

A file lists its classes in `TASKS`; `chela_plugin.harness.config` makes one union of them all. A class names itself
(`task: Literal['name']`), the kind of backbone that it runs on, and the module under `chela_plugin.harness.tasks` that
holds its data: `examples(config, split) -> Examples` and optionally `augment(config, inputs, generator)`.
"""
