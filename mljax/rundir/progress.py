"""The progress of a run: one live line, metrics.jsonl, TensorBoard events."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from mljax.errors import UserError, printable, printable_lines, remedy
from mljax.rundir import measurements
from mljax.rundir.events import Events
from mljax.rundir.files import write_text
from mljax.trees import flatten


class Writer:
    """Metrics to files, lines to the terminal. Use it as a context."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        # The stream itself decides: in notebooks rich believes in a terminal, and draws every refresh anew.
        self.live = sys.stderr.isatty()
        self.console = Console(
            file=sys.stderr, highlight=False, soft_wrap=True, force_jupyter=False, force_terminal=self.live
        )
        self._jsonl = self._events = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        sinks, self._jsonl, self._events = (self._jsonl, self._events), None, None
        for sink in sinks:
            if sink is not None:
                with contextlib.suppress(OSError):
                    sink.close()

    def line(self, text: str) -> None:
        self.console.print(printable_lines(text), markup=False)

    def resume(self, stage: int, step: int) -> None:
        """Forget what was measured after this step: a run that goes on from a checkpoint measures it again.

        A half-written last line goes too, damaged ones go into metrics.damaged.jsonl, and the TensorBoard events are
        made again from the lines that stay.
        """
        path = self.workdir / measurements.NAME
        if not path.is_file():
            return
        with self._writing():
            text = path.read_text(errors="replace")
            good, damaged = measurements.parse(text)
            kept = [(line, e) for line, e in good if (e["stage"], e["step"]) <= (stage, step)]
            if damaged:
                with (self.workdir / measurements.DAMAGED).open("a") as file:
                    file.writelines(damaged)
                self.line(f"{path} has {measurements.count(damaged)}; moved to {measurements.DAMAGED}")
            if (whole := "".join(line for line, _ in kept)) == text:
                return
            self._close()
            write_text(path, whole)
            for stale in self.workdir.glob("events.out.tfevents.*"):
                stale.unlink(missing_ok=True)
            for _, entry in kept:
                values = {k: v for k, v in entry.items() if k not in ("step", "stage", "time")}
                self._write_events(entry["step"], values, entry["stage"], entry.get("time", 0.0))

    def scalars(self, step: int, values: dict[str, Any], stage: int) -> None:
        """One line of metrics.jsonl, and the same in TensorBoard; values that are None are left out of the latter."""
        now = round(time.time(), 3)
        with self._writing():
            if self._jsonl is None:
                self._jsonl = (self.workdir / measurements.NAME).open("a")
            self._jsonl.write(measurements.line({"step": step, "stage": stage, "time": now, **values}))
            self._jsonl.flush()
            self._write_events(step, values, stage, now)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"Metrics cannot be written to {self.workdir} ({error.strerror});"
                f" {remedy(error.errno, 'free space')} and run the same command again."
            ) from None

    def _write_events(self, step: int, values: dict[str, Any], stage: int, when: float) -> None:
        if self._events is None:
            self._events = Events(self.workdir)
        named = {f"stage{stage}/{name}" if stage else name: value for name, value in values.items()}
        self._events.add(step, {name: value for name, value in named.items() if value is not None}, when)

    def model_table(self, params: Any, workdir: Path, frozen: Collection[str] = ()) -> None:
        """clu's table of every parameter into model.txt; its sums by module to the terminal.

        Args:
          frozen: paths of parameters that are not trained, "backbone/stem/kernel".
        """
        from clu import parameter_overview

        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        write_text(workdir / "model.txt", table + "\n")
        self.line(by_module(params, frozen))

    @contextlib.contextmanager
    def task(self) -> Iterator[Callable[[str, int, int], None]]:
        """A progress line for preparations: `show(what, done, total)`."""
        shown = time.perf_counter()
        bar = self.bar() if self.live else None
        tasks: dict[str, tuple[Any, int, float]] = {}

        def show(what: str, done: int, total: int) -> None:
            nonlocal shown
            what = printable(what)
            now = time.perf_counter()
            if what not in tasks:  # the first call may have waited for the compiler: it does not count for what is left
                tasks[what] = bar and bar.add_task(what, total=total, info=""), done, now
            task, first, began = tasks[what]
            if bar is not None:
                left = duration((now - began) / (done - first) * (total - done)) if done > first else "?"
                bar.update(task, completed=done, info=f"{left} left" if done < total else "done")
            elif done == total or now - shown > 30:
                shown = now
                self.line(f"{what}: {done}/{total}")

        with bar if bar is not None else contextlib.nullcontext():
            yield show

    def bar(self) -> Progress:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            Count(),
            TextColumn("{task.fields[info]}", markup=False),
        )
        return Progress(*columns, console=self.console)


class Count(ProgressColumn):
    """20/180, as wide at the first step as at the last."""

    def render(self, task: Task) -> Text:
        total = f"{int(task.total or 0)}"
        return Text(f"{int(task.completed):>{len(total)}}/{total}")


class Meter:
    """The live line of training: steps, images/s, loss, time left; where there is no terminal, a line now and then.

    Use it as a context, so that the terminal gets its line and cursor back whatever happens.
    """

    QUIET = 15.0  # seconds between lines where there is no terminal

    def __init__(self, writer: Writer, label: str, start: int, total: int, batch_size: int):
        self.writer, self.label, self.total, self.batch_size = writer, label, total, batch_size
        self.first, self.began = start, time.perf_counter()
        self.paused = 0.0  # seconds of evaluation: they are not training time
        self.mark = (start, self.began)
        self.shown, self.info = 0.0, ""
        self.bar = writer.bar() if writer.live else None

    def __enter__(self) -> "Meter":
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(
                f"{self.label}training", total=self.total, completed=self.first, info="compiling"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def compiled(self, step: int) -> None:
        """After the first step: its time is the compiler's, and counts neither for speed nor for what is left."""
        seconds = time.perf_counter() - self.began
        self.first, self.began = step, time.perf_counter()
        self.mark = (step, self.began)
        if seconds > 2:
            self.writer.line(f"{self.label}compiled in {duration(seconds)}")

    def say(self, text: str) -> None:
        """Show a short text, such as "evaluating", in the live line."""
        if self.bar is not None:
            self.bar.update(self.task, info=text)

    def update(self, lines: list[tuple[int, dict[str, float]]], stage: int) -> None:
        """Metrics up to some steps, which were fetched together; the last is the one that is shown."""
        now, (step, metrics) = time.perf_counter(), lines[-1]
        done, seconds = step - self.mark[0], now - self.mark[1]
        rate = done * self.batch_size / seconds if done else None
        self.mark = (step, now)
        for at, values in lines:
            self.writer.scalars(at, values if rate is None else {**values, "images_per_s": round(rate, 2)}, stage)
        info = [f"loss {metrics['loss']:#.4g}"]
        if rate is not None:
            left = (now - self.began - self.paused) / (step - self.first) * (self.total - step)
            info += [f"{rate:.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s", f"{duration(left)} left"]
        self.info = "  ".join(info)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, info=self.info)
        elif now - self.shown > self.QUIET or step == self.total:
            self.shown = now
            self.writer.line(f"{self.label}{self._step(step)}  {self.info}")

    def evaluated(self, reports: dict[str, dict[str, float]], seconds: float) -> None:
        self.say(self.info)
        self.paused += seconds
        self.mark = (self.mark[0], time.perf_counter())
        shown = "  ".join(
            f"{kind} mAP {_percent(metrics['mAP'])} OF1 {_percent(metrics['OF1'])}" for kind, metrics in reports.items()
        )
        self.writer.line(f"{self.label}{self._step(self.mark[0])}  {shown}  evaluated in {duration(seconds)}")

    def _step(self, step: int) -> str:
        return f"step {step:>{len(str(self.total))}}/{self.total}"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def by_module(params: Any, frozen: Collection[str] = ()) -> str:
    """Parameters of every module of the system, one level deep, and their sum: how many, how many of them are trained,
    MB, and arrays.

    Args:
      frozen: paths of those that are not trained, "backbone/stem/kernel".
    """
    modules: dict[str, list[tuple[int, int, int]]] = {}
    for path, x in flatten(params).items():
        size = int(math.prod(x.shape))
        modules.setdefault(path.partition("/")[0], []).append((size, 0 if path in frozen else size, x.nbytes))
    modules["in all"] = [leaf for leaves in modules.values() for leaf in leaves]
    rows = [("module", "parameters", "trained", "MB", "arrays")]
    for name, leaves in modules.items():
        size, trained, memory = (sum(column) for column in zip(*leaves))
        rows.append(
            (name, f"{size:,}", f"{trained:,}" if trained else "frozen", f"{memory / 1e6:,.2f}", f"{len(leaves)}")
        )
    wide = [max(len(row[i]) for row in rows) for i in range(5)]
    wide[3] = max(wide[3], 8)
    return "\n".join(
        "  ".join([row[0].ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(row[1:], wide[1:]))]) for row in rows
    )


def duration(seconds: float) -> str:
    """8 s, 2 min 05 s, 3 h 07 min."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    if seconds < 6000:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
