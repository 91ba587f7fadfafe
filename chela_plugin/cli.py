"""The `chela` command: which mixers there are, ablations, reports."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Compare token mixers on equal terms.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # a fault of ours ends in a plain traceback that can be sent to us
)
console = Console(highlight=False)

# Beside the result and its difference to the baseline; the files have every column, a terminal of 80 has not the room.
TERMINAL_COLUMNS = ("mixer", "parameters", "tokens/s")


@app.callback()
def _chela() -> None:
    """Compare token mixers on equal terms."""


@app.command()
def mixers() -> None:
    """List every installed mixer, whether it can be loaded here, and what would mend it if not."""
    from chela_plugin import list_mixers

    table = Table(box=None, pad_edge=False)
    for column in ("mixer", "from", "available", "what it is, or what is missing"):
        table.add_column(column, overflow="fold")
    for mixer in list_mixers():
        about = (
            mixer.summary if mixer.available else f"{mixer.reason}; {mixer.remedy}" if mixer.remedy else mixer.reason
        )
        table.add_row(
            mixer.name, mixer.distribution, "yes" if mixer.available else "no", (about or "").replace("[", r"\[")
        )
    console.print(table)


@app.command()
def ablate(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE... [KEY=VALUE]...",
            help="YAML files or shipped ablations such as digits; dotted overrides such as training.steps=100.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Results folder; default: runs/ and the ablations' names.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs side by side; default: one a GPU, else one a processor, at most 8.")
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(min=1, help="Save and stop after so many, with exit code 75; the same command goes on."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run over a Ray cluster: local starts one, auto or HOST:PORT joins one."),
    ] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="wandb or trackio, beside TensorBoard; may be given more than once.")
    ] = None,
) -> None:
    """Train every mixer of an ablation on equal terms; the same command goes on where it was stopped."""
    from chela_plugin.harness.config import ConfigError, is_override, load_ablation, shipped

    if ray is not None and workers is not None:
        raise ConfigError("--workers and --ray exclude each other: with --ray, the cluster's slots say how many run")
    overrides = [word for word in files if is_override(word)]
    sources = [word for word in files if not is_override(word)]
    if not sources:
        raise ConfigError(f"no ablation given; name a YAML file, or a shipped one: {', '.join(shipped('ablations'))}")
    ablations = {}
    for source in sources:
        name, config = load_ablation(source, overrides)
        if name in ablations:
            raise ConfigError(f"two ablations are named {name!r} (a file's name without .yaml); rename one")
        ablations[name] = config
    folder = out or Path("runs") / "+".join(ablations)

    from chela_plugin.harness.ablation import run_ablations

    stopped_by = run_ablations(
        ablations,
        folder,
        console,
        workers,
        max_seconds=math.inf if max_seconds is None else max_seconds,
        ray=ray,
        trackers=track or (),
    )
    if stopped_by is not None:
        options = {"--out": out, "--workers": workers, "--max-seconds": max_seconds, "--ray": ray}
        given = [word for name, value in options.items() if value is not None for word in (name, str(value))]
        given += [word for name in track or () for word in ("--track", name)]
        again = shlex.join(["chela", "ablate", *files, *given])
        _say(f"stopped; all progress is in {folder}. To go on, give the same command again:\n  {again}")
        raise typer.Exit(stopped_by)
    if _report(folder):
        raise typer.Exit(1)


@app.command()
def train(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG [KEY=VALUE]...",
            help="YAML file or shipped run such as bytes_small; dotted overrides such as training.steps=100.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The run's folder; default: runs/ and the config's name.")] = None,
) -> None:
    """Train one language or image model, on one device or many; the same command goes on where it was stopped."""
    from chela_plugin.harness.config import ConfigError, is_override
    from chela_plugin.harness.train.config import load_run, shipped

    sources = [word for word in words if not is_override(word)]
    if len(sources) != 1:
        raise ConfigError(f"one YAML file or shipped run is needed ({', '.join(shipped())}), got {len(sources)}")
    name, run = load_run(sources[0], [word for word in words if is_override(word)])
    folder = out or Path("runs") / name

    from chela_plugin.harness.train.launch import TrainingFailed, start

    try:
        stopped_by = start(run, folder, console)
    except TrainingFailed as error:
        Console(stderr=True, highlight=False).print(f"chela: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if stopped_by is not None:
        again = shlex.join(["chela", "train", *words, *(["--out", str(out)] if out else [])])
        _say(f"stopped; all progress is in {folder}. To go on, give the same command again:\n  {again}")
        raise typer.Exit(128 + stopped_by)
    _say(f"model, metrics.jsonl and result.json are in {folder}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A results folder that `chela ablate` wrote.")],
    check: Annotated[
        Path | None, typer.Option(help="Markdown file whose tables are compared with the JSON lines, digit by digit.")
    ] = None,
) -> None:
    """Write tables, curves and an HTML page from the JSON lines; with --check, verify published tables instead.

    Both look at every run for equal terms: parameters, data, order of examples, steps, schedule, learning rate.
    """
    if check is None:
        _report(folder)
        return
    from chela_plugin.harness.results import ResultsError, open_for_reading
    from chela_plugin.harness.table import check as check_tables
    from chela_plugin.harness.table import tables

    if not check.is_file():
        raise ResultsError(f"{check} is no file; --check takes the Markdown file with the published tables")
    manifest, records = open_for_reading(folder)
    count, wrong = check_tables(check.read_text(encoding="utf-8"), tables(manifest, records))
    if not count:
        raise ResultsError(
            f"{check} holds no table of a report (a line '<!-- chela report: ablation/task -->' and the table)"
        )
    for sentence in wrong:
        _say(sentence)
    _say(f"{check}: {count} tables, {len(wrong)} differences from {folder}")
    if _unequal(manifest, records) or wrong:
        raise typer.Exit(1)


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(metavar="operators|layers|vision|lm|plot", help="What to time; or `plot`.")],
    file: Annotated[Path | None, typer.Argument(metavar="[FILE.json]", help="For plot: the record to draw.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, or cpu at small sizes; default: the GPU if any.")] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option("--filter", help="Only what this regular expression finds, e.g. 'T=4096 .*chela'; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON record, written case by case; for plot: the PNG.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of interleaved timing.")] = 15,
    budget: Annotated[
        float, typer.Option(min=1, help="Seconds for warming up one contender, compilation included.")
    ] = 120,
    revision: Annotated[str | None, typer.Option(help="Of the code, where there is no git repository.")] = None,
    processes: Annotated[int, typer.Option(min=0, help="That compile kernels ahead on a GPU; 0: none.")] = 0,
) -> None:
    """Time ours and every available peer, interleaved in one process; `chela bench plot FILE.json` draws a record."""
    from chela_plugin.harness.config import ConfigError

    if suite == "plot":
        from chela_plugin.bench.plot import draw

        if file is None:
            raise ConfigError("chela bench plot takes the JSON file that a suite wrote")
        _say(f"curves  {draw(file, out)}")
        return
    if file is not None:
        raise ConfigError(f"chela bench {suite} takes no file ({file}); --out names the record that it writes")
    # Before torch starts: contenders of different shapes in one process would fragment the memory.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    from chela_plugin.bench.suites import SUITES
    from chela_plugin.bench.suites import bench as run

    if suite not in SUITES:
        raise ConfigError(f"no suite {suite!r}; choose one of {', '.join(SUITES)}, or plot")
    record = run(
        suite,
        console,
        device=device,
        filters=filters or [],
        out=out,
        rounds=rounds,
        budget_s=budget,
        revision=revision,
        processes=processes,
    )
    for row in record["skipped"]:
        _say(f"skipped {row['name']}: {row['reason']}")
    if out is not None:
        _say(f"record  {out}")


def _unequal(manifest: dict[str, Any], records: Sequence[dict[str, Any]]) -> bool:
    """Say which runs had other terms than the others of their task; returns whether there is one."""
    from chela_plugin.harness.terms import violations

    count, wrong = violations(manifest, records)
    for sentence in wrong:
        _say(sentence)
    _say(f"equal terms: {count} runs, {len(wrong)} violations")
    return bool(wrong)


@app.command()
def data(
    task: Annotated[
        list[str], typer.Argument(metavar="TASK [KEY=VALUE]...", help="YAML file or shipped task such as mqar.")
    ],
    show: Annotated[int, typer.Option(min=0, help="Examples of the training split to print.")] = 2,
) -> None:
    """Generate or check a task's data: how much, how fast, where it lies, and what it looks like."""
    import time

    from rich.progress import Progress, TaskID

    from chela_plugin.harness.config import ConfigError, is_override, load_task, shipped

    sources = [word for word in task if not is_override(word)]
    if len(sources) != 1:
        raise ConfigError(f"name one task: a YAML file, or a shipped one: {', '.join(shipped('tasks'))}")
    config = load_task(sources[0], [word for word in task if is_override(word)])

    from chela_plugin.harness.extras import need
    from chela_plugin.harness.preview import preview
    from chela_plugin.harness.tasks import SPLITS, cache, examples

    for package, extra in config.packages:
        need(package, extra)
    for split in SPLITS:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            work = bar.add_task(f"{config.task}, {split}", total=None)

            def advance(done: int, total: int, bar: Progress = bar, work: TaskID = work) -> None:
                bar.update(work, completed=done, total=total)

            with cache.reporting(advance):
                start = time.perf_counter()
                found = examples(config, split)
                seconds = time.perf_counter() - start
        shape = " x ".join(map(str, found.inputs.shape[1:]))
        _say(f"{split:<11}{len(found):>9,} examples of {shape}, {len(found) / seconds:,.0f}/s, {found.sha256()[:16]}")
        if split == "train":
            shown = [preview(found, row * len(found) // max(1, show)) for row in range(min(show, len(found)))]
    if config.generated:
        _say(f"kept in {cache.folder()}, read from there from now on")
    for picture in shown:
        _say("\n" + picture)


def _report(folder: Path) -> bool:
    """Write and show a report; returns whether a run in it has no result or had other terms than the others."""
    from chela_plugin.harness.report import write_report
    from chela_plugin.harness.results import open_for_reading

    written = write_report(folder)
    for table in written.tables:
        shown = Table(title=table.key, title_justify="left", box=None, pad_edge=False, header_style="bold")
        narrow = [
            i for i, name in enumerate(table.header) if name in TERMINAL_COLUMNS or name.startswith(("test ", "minus "))
        ]
        for i in narrow:
            shown.add_column(table.header[i], justify="right" if i else "left", overflow="fold")
        for row in table.rows:
            shown.add_row(*(row[i].replace("[", r"\[") for i in narrow))
        console.print(shown)
        for note in table.notes:
            _say(f"  {note}")
        console.print()
    _say(f"table   {written.markdown}")
    _say(f"curves  {written.curves}")
    _say(f"page    {written.page}")
    return _unequal(*open_for_reading(folder)) or any(table.notes for table in written.tables)


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def main() -> None:
    """Entry point: an error of the user's ends in one message and exit code 2, not in a traceback."""
    from chela_plugin.harness.config import ConfigError
    from chela_plugin.harness.extras import MissingPackage
    from chela_plugin.harness.results import ResultsError

    try:
        app()
    except (ConfigError, ResultsError, MissingPackage) as error:
        Console(stderr=True, highlight=False).print(f"chela: {error}", markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
