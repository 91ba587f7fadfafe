"""Placeholder until the hooks land."""


def install() -> None:
    return
