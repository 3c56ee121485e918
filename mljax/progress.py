"""What a person sees of a run, and what is kept of it: one live line, metrics.jsonl, TensorBoard events."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mljax.errors import UserError

log = logging.getLogger("mljax")


class Writer:
    """Metrics to files, lines to the terminal. Use it as a context."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal
        self._jsonl = self._events = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for sink in (self._jsonl, self._events):
            if sink is not None:
                with contextlib.suppress(OSError):
                    sink.close()

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def scalars(self, step: int, values: dict[str, Any], stage: int) -> None:
        """One line of metrics.jsonl, and the same in TensorBoard; values that are None are left out of the latter."""
        from tensorboardX import SummaryWriter

        try:
            if self._jsonl is None:
                self._jsonl = (self.workdir / "metrics.jsonl").open("a")
                self._events = SummaryWriter(str(self.workdir), flush_secs=30)
            self._jsonl.write(
                json.dumps({"step": step, "stage": stage, "time": round(time.time(), 3), **values}) + "\n"
            )
            self._jsonl.flush()
            for name, value in values.items():
                if value is not None:
                    self._events.add_scalar(f"stage{stage}/{name}" if stage else name, value, step)
        except OSError as error:
            raise UserError(
                f"Metrics cannot be written to {self.workdir} ({error.strerror}); free space and run the same command again."
            ) from None

    def model_table(self, params: Any, workdir: Path) -> None:
        """clu's table of parameters into model.txt, its last line to the terminal."""
        from clu import parameter_overview

        from mljax.rundir import write_text

        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        write_text(workdir / "model.txt", table + "\n")
        lines = table.splitlines()
        self.line(table if len(lines) <= 60 else "\n".join([*lines[:28], "| ...", *lines[-28:]]))

    @contextlib.contextmanager
    def task(self) -> Iterator[Callable[[str, int, int], None]]:
        """A progress line for preparations: `show(what, done, total)`."""
        began, shown = time.perf_counter(), 0.0
        bar = self._bar() if self.live else None
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            nonlocal shown
            if bar is not None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total, info="")
                bar.update(tasks[what], completed=done)
            elif done == total or time.perf_counter() - shown > 30:
                shown = time.perf_counter()
                self.line(f"{what}: {done}/{total}, {shown - began:.0f} s")

        with bar if bar is not None else contextlib.nullcontext():
            yield show

    def _bar(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
        )
        return Progress(*columns, TextColumn("{task.fields[info]}"), TimeRemainingColumn(), console=self.console)


class Meter:
    """The live line of training: steps, images/s, loss, time left; a plain line now and then where there is no terminal."""

    def __init__(self, writer: Writer, label: str, start: int, total: int, batch_size: int):
        self.writer, self.label, self.total, self.batch_size = writer, label, total, batch_size
        self.first, self.began = start, time.perf_counter()
        self.paused = 0.0  # seconds of evaluation: they are not training time
        self.mark = (start, self.began)
        self.shown = 0.0
        self.bar = writer._bar() if writer.live else None
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(f"{label}training", total=total, completed=start, info="")

    def update(self, step: int, metrics: dict[str, float], stage: int) -> None:
        now = time.perf_counter()
        rate = (step - self.mark[0]) * self.batch_size / max(now - self.mark[1], 1e-9)
        self.mark = (step, now)
        self.writer.scalars(step, {**metrics, "images_per_s": round(rate, 2)}, stage)
        info = f"loss {metrics['loss']:.4g}  {rate:.0f} images/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, info=info)
        elif now - self.shown > 15 or step == self.total:
            self.shown = now
            spent = now - self.began - self.paused
            left = spent / max(step - self.first, 1) * (self.total - step)
            self.writer.line(f"{self.label}step {step}/{self.total}  {info}  {left:.0f} s left")

    def evaluated(self, found: dict[str, dict[str, float]], seconds: float) -> None:
        self.paused += seconds
        self.mark = (self.mark[0], time.perf_counter())
        shown = "  ".join(
            f"{kind} mAP {metrics['mAP']:.2f} OF1 {metrics['OF1']:.2f}" for kind, metrics in found.items()
        )
        self.writer.line(f"{self.label}step {self.mark[0]}: {shown}  ({seconds:.1f} s)")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
