"""Another name for `chela_plugin.bench.timing`, for scripts that import it from here."""

from chela_plugin.bench.timing import BANDWIDTH, conditions, event_times, peak_over_inputs, quantiles

__all__ = ["BANDWIDTH", "conditions", "event_times", "peak_over_inputs", "quantiles"]
