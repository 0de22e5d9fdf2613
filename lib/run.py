"""Run the notebooks headless and in order: `./run_all.sh`, or `python -m lib`.

A notebook is run again only if its text, the code it imports, its settings, its data or its outputs changed.
Exit codes: 0 done, 1 a cell failed, 2 wrong input (one line says what), 130 interrupted.
"""

import argparse
import json
import sys
import threading
import time

import filelock
import nbformat
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from lib import gallery, kernels, opinions, paths, profiles, steps
from lib.errors import UserError

PARAMETERS = ("profile", "seed", "overrides")
console = Console(highlight=False)


def notebooks(only=None):
    """Paths of the notebooks in order; `only` is a list of numbers such as ["01", "2"]."""
    found = {p.name[:2]: p for p in sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    wanted = [n.strip().zfill(2) for n in only] if only else list(found)
    for number in wanted:
        if number not in found:
            raise UserError(f"--only {number}: no such notebook; there are {', '.join(found)}")
    return [found[n] for n in sorted(set(wanted))]


class Memory:
    """Peak memory of this process's children, sampled; on Linux what they share is counted once.

    Once a second, and to within two in a hundred: both take time that two busy cores do not have.
    """

    def __enter__(self):
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        me, most = psutil.Process(), 0
        while not self._stop.wait(1):
            children = me.children(recursive=True)
            total = sum(_of(c, lambda c: c.memory_info().rss) for c in children)
            if total > 1.02 * most:  # what is shared is counted apart, which holds the processes up
                most = total
                self.peak = max(self.peak, sum(_of(c, _own_memory) for c in children))

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def _own_memory(process):
    """Bytes of a process, of what it shares with others only its part; where that is not known, all of it."""
    facts = process.memory_full_info()
    return getattr(facts, "pss", facts.rss)


def _of(process, read):
    """What `read` finds of a process; 0 where it ended since it was listed."""
    try:
        return read(process)
    except psutil.Error:
        return 0


def _clock(seconds):
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def _bar():
    columns = (
        "[progress.description]{task.description}",
        BarColumn(24),
        "{task.completed:>3.0f}/{task.total:.0f} cells",
    )
    text = [c if isinstance(c, BarColumn) else TextColumn(c) for c in columns]
    return Progress(*text, TextColumn("{task.fields[clock]}"), console=console, refresh_per_second=2)


def execute(path, settings, expected, **how):
    """Run one notebook through papermill with a live line; returns its record. Raises papermill's error.

    how: further options of nbclient.
    """
    import papermill
    from papermill.engines import NBClientEngine, papermill_engines

    known = papermill.inspect_notebook(str(path))
    if missing := [p for p in PARAMETERS if p not in known]:  # papermill itself would only warn
        raise UserError(f"{path.name}: its parameters cell lacks {', '.join(missing)}; restore it")
    total = len(nbformat.read(path, as_version=4).cells) + 1  # papermill adds the injected parameters
    start, target = time.monotonic(), paths.RESULTS / settings.profile / "notebooks" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    before = time.time()
    overrides = profiles.plain(settings.overrides)
    mark = steps.fingerprint(path, settings)  # before the run: what changes during it counts for the next one

    with _bar() as bar, Memory() as memory:
        task = bar.add_task(f"{path.stem:<16}", total=total, clock="")

        def tick():
            bar.update(task, clock=f"{_clock(time.monotonic() - start)} of about {_clock(expected)}")

        class Watched(NBClientEngine):
            """papermill's engine, telling the progress bar about every finished cell."""

            @classmethod
            def execute_managed_notebook(cls, nb_man, *args, **kwargs):
                done = nb_man.cell_complete

                def complete(*a, **k):
                    bar.advance(task)
                    return done(*a, **k)

                nb_man.cell_complete = complete
                return super().execute_managed_notebook(nb_man, *args, **kwargs)

        papermill_engines.register("watched", Watched)
        clock = threading.Event()
        threading.Thread(target=lambda: _every(clock, tick), daemon=True).start()
        try:
            papermill.execute_notebook(
                str(path),
                str(target),
                parameters={"profile": settings.profile, "seed": settings.seed, "overrides": overrides},
                engine_name="watched",
                kernel_name="python3",
                cwd=str(paths.NOTEBOOKS),
                progress_bar=False,
                log_output=False,
                request_save_on_cell_execute=False,
                extra_arguments=["--log-level=CRITICAL"],  # it talks to this machine only, and is interrupted when done
                **how,
            )
        finally:
            clock.set()
            tick()
    for stale in steps.outputs(path, settings):
        if stale.stat().st_mtime < before - 1:  # from an earlier version of the notebook
            stale.unlink()
    return steps.keep(path, settings, mark, time.monotonic() - start, memory.peak)


def _every(stop, call):
    while not stop.wait(0.5):
        call()


def _row(name, record, state):
    kinds = [json.loads((paths.ROOT / o).read_text("utf-8"))["kind"] for o in record["outputs"] if o.endswith(".json")]
    minutes = f"{record['seconds'] / 60:.1f}"
    return name, state, minutes, f"{record['peak_gb']:.2f}", str(kinds.count("figure")), str(kinds.count("table"))


def _explain(error, path, settings):
    """Print a failed cell's own error; returns the exit code."""
    if error.ename == "UserError":
        print(f"Error: {error.evalue}", file=sys.stderr)
        return 2
    shown = (paths.RESULTS / settings.profile / "notebooks" / path.name).relative_to(paths.ROOT)
    print("\n".join(error.traceback), file=sys.stderr)
    print(f"\n{path.stem}, cell [{error.exec_count}]: {error.ename}: {error.evalue}", file=sys.stderr)
    print(f"The notebook as far as it ran: {shown}", file=sys.stderr)
    return 1


def _preflight(settings, chosen):
    """Refuse wrong input before anything is written or loaded."""
    frame = opinions.load(settings.opinions)
    names = {p.stem for p in chosen}
    if "02_classifier" in names:
        from lib import classifier, encoders

        classifier.split(frame[frame["split"] == "train"], settings.classifier.validation_share, settings.seed)
        if settings.classifier.encoder != "packaged":
            encoders.check(settings.classifier.encoder)
    if "03_qlora" in names:
        from lib import qlora

        qlora.check(settings, frame)
    if "07_icl" in names:
        from lib import icl

        icl.prompts()


def arguments(argv):
    parser = argparse.ArgumentParser(
        prog="./run_all.sh", description="Regenerate every figure and table: notebooks 01 onwards, headless."
    )
    parser.add_argument("--profile", default="tiny", help=f"one of {', '.join(profiles.names())} (default: tiny)")
    parser.add_argument("--only", type=lambda s: s.split(","), help="notebook numbers, as in --only 01,02")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting; repeatable"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="reuse nothing: remove what these notebooks made before in this profile, under whatever settings "
        "(09: the cells of both grids)",
    )
    return parser.parse_args(argv)


def run(argv):
    """Parse, check, run; returns the exit code. Raises UserError."""
    args = arguments(argv)
    overrides = dict(profiles.parse_override(text) for text in args.set)
    settings = profiles.load(args.profile, args.seed, overrides)
    chosen = notebooks(args.only)
    _preflight(settings, chosen)
    folder = paths.RESULTS / settings.profile
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            steps.sweep(settings, chosen, args.fresh)
            return _run_all(settings, chosen)
    except filelock.Timeout:
        raise UserError(f"results/{settings.profile}: another run is at work there; wait for it or stop it") from None


def _run_all(settings, chosen):
    from papermill.exceptions import PapermillExecutionError

    rows, code, how = [], 0, {}
    for path in chosen:
        record = steps.finished(path, settings)
        if record:
            console.print(f"{path.stem:<16} up to date, reused")
            rows.append(_row(path.stem, record, "reused"))
            continue
        try:
            ready = path != chosen[-1] and kernels.prepare()  # while this one runs, for those that follow
            record = execute(path, settings, steps.expected(path, settings), **how)
            how = {"kernel_manager_class": kernels.Copied} if ready else how
            rows.append(_row(path.stem, record, "made"))
        except PapermillExecutionError as error:
            code = _explain(error, path, settings)
            rows.append((path.stem, "FAILED", "", "", "", ""))
            break
        finally:  # also when interrupted: the page shows what is there
            if (paths.FIGURES / settings.profile).exists():
                gallery.write(settings.profile)
    _summary(rows, paths.FIGURES / settings.profile / "index.html")
    return code


def _summary(rows, page):
    table = Table("notebook", "", *(f"{c}" for c in ("minutes", "peak GB", "figures", "tables")))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if page.exists():
        console.print(f"Gallery: {page.relative_to(paths.ROOT)}", soft_wrap=True)


def main(argv=None):
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. What is finished is kept: the same command goes on from there.", file=sys.stderr)
        return 130


if __name__ == "__main__":  # as `python -m lib`, with kernels that start 3 s later
    sys.exit(main())
