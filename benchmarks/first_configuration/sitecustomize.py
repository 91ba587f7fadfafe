"""Python imports this at its start where PYTHONPATH names the folder: the peers' kernels then take one configuration.

fla's and mamba-ssm's kernels compare many configurations at each new shape, which takes minutes in every process. What
a kernel computes doesn't depend on it, its speed does: for tables of results only, never where something is timed.
"""

import contextlib

PEERS = ("fla.", "mamba_ssm.")


def _take_the_first() -> None:
    from triton.runtime.autotuner import Autotuner

    whole = Autotuner.__init__

    def first(self, fn, arg_names, configs, *args, **kwargs):
        inner = fn
        while inner is not None and not str(getattr(inner, "__module__", "")).startswith(PEERS):
            inner = getattr(inner, "fn", None)
        whole(self, fn, arg_names, list(configs)[:1] if inner is not None and configs else configs, *args, **kwargs)

    Autotuner.__init__ = first


with contextlib.suppress(ImportError):  # no Triton, no search
    _take_the_first()
