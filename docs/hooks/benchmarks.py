"""mkdocs hook: fills benchmarks.md with tables and charts out of benchmarks/results, at build time."""

from __future__ import annotations

import importlib.util
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PLACE = "<!-- drawn from benchmarks/results by docs/hooks/benchmarks.py -->"

# file name: (title, how to read one row as (line, T, forward ms), or None for a row that is no part of the chart)
CHARTS = {
    "linear_attention_h100": (
        "Causal linear attention, 16 heads of width 128, 32,768 tokens",
        lambda row: (
            (f"{row['who']}, {row['variant']}", row["T"], row["ms"][0])
            if (row["H"], row["K"], row["V"], row["what"]) == (16, 128, 128, "forward")
            else None
        ),
    ),
    # Its modal rows are of kernels that were withdrawn; the table takes them from a record of their own.
    "long_conv_h100": (
        "Causal long convolution, width 1,024, 32,768 tokens",
        lambda row: (
            (row["name"], row["T"], row["forward_ms"][0])
            if row["D"] == 1024 and row["B"] * row["T"] == 32768 and not row["name"].startswith("modal_conv")
            else None
        ),
    ),
}

# Records of `chela bench`, drawn as its `plot` does. file name: (title, function of benchmarks/tables.py)
SUITES = {
    "layers_h100": ("Whole layers, width 1,024, 32,768 tokens, forward + backward, ms", "layers"),
    "vision_h100": ("Vision backbones, images a second", "vision"),
    "lm_h100": ("Language models of 340 million parameters, tokens a second", "language_models"),
}


def measured() -> list[str]:
    """Those of SUITES whose file there is."""
    return [name for name in SUITES if (RESULTS / f"{name}.json").exists()]


def tables() -> Any:
    """benchmarks/tables.py, which is a script and no part of the package."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chart(title: str, points: list[tuple[str, int, float]]) -> bytes:
    """A PNG of forward milliseconds against T, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in dict.fromkeys(name for name, _, _ in points):
        line = sorted((T, ms) for other, T, ms in points if other == name)
        axes.plot([T for T, _ in line], [ms for _, ms in line], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens in a sequence", ylabel="forward, ms", title=title)
    times = sorted({T for _, T, _ in points})
    axes.set_xticks(times, [f"{T:,}" for T in times])
    axes.minorticks_off()
    lowest, highest = min(ms for *_, ms in points), max(ms for *_, ms in points)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if lowest / 2 <= tick <= highest * 2]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return file.getvalue()


def on_files(files: Files, *, config: Any) -> Files:
    for name, (title, read) in CHARTS.items():
        rows = json.loads((RESULTS / f"{name}.json").read_text())["results"]
        points = [point for point in map(read, rows) if point is not None]
        files.append(File.generated(config, f"{name}.png", content=chart(title, points)))
    from chela_plugin.bench.plot import draw

    with tempfile.TemporaryDirectory() as folder:
        for name in measured():
            drawn = draw(RESULTS / f"{name}.json", Path(folder) / f"{name}.png")
            files.append(File.generated(config, f"{name}.png", content=drawn.read_bytes()))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    if page.file.src_uri != "benchmarks.md":
        return markdown
    if PLACE not in markdown:
        raise ValueError(f"benchmarks.md has lost the line {PLACE}")
    script, parts = tables(), []
    drawn = {name: (title, name.removesuffix("_h100")) for name, (title, _) in CHARTS.items()}
    for name, (title, function) in (drawn | {name: SUITES[name] for name in measured()}).items():
        about = json.loads((RESULTS / f"{name}.json").read_text())
        versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
        parts += [f"## {title}", getattr(script, function)(), f"![{title}]({name}.png)"]
        parts += [f"{about['device']}; {versions}; revision {about['revision']}; `benchmarks/results/{name}.json`."]
    for report in sorted(RESULTS.glob("*/report.md")):
        text = report.read_text()
        body = "\n".join(line for line in text.splitlines() if not line.startswith(("# ", "![")))
        parts += [f"## Ablation: {report.parent.name}", body.replace("\n## ", "\n### ")]
    return markdown.replace(PLACE, "\n\n".join(parts))
