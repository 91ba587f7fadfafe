"""The built-in mixers, one factory a file, found through the entry points that pyproject.toml declares."""
