"""Which stage of which run."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mljax import parallel, rundir
from mljax.errors import OutOfMemory, exhausted
from mljax.types import Config


@dataclasses.dataclass(frozen=True)
class StageSpec:
    """Which stage of which run.

    Attributes:
      config: of the stage, checked.
      workdir: of the run.
      index, count: the stage, from 0, and how many stages the run has.
    """

    config: Config
    workdir: Path
    index: int = 0
    count: int = 1

    @property
    def label(self) -> str:
        """What its lines on the terminal start with."""
        return f"stage {self.index + 1}/{self.count} " if self.count > 1 else ""

    @property
    def folder(self) -> Path:
        """Its checkpoints."""
        return self.workdir / "checkpoints" / f"{self.index}"

    @property
    def bad_images(self) -> Path:
        """The list of the run's training images that cannot be read."""
        return self.workdir / rundir.BAD_IMAGES

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    @property
    def devices(self) -> list[Any]:
        return parallel.devices_for(self.config.devices)

    @contextlib.contextmanager
    def fitting(self, section: str, labels: int | None = None) -> Iterator[None]:
        """Memory that runs out inside is an OutOfMemory that names whose batch_size it is.

        Args:
          section: "optim" or "eval", of the config.
          labels: how many there are, if that is known.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not exhausted(error):
                raise
            config, stage = self.config, self.index + 1
            size = config[section].batch_size
            raise OutOfMemory(section, size, config.input.size, stage, self.count, labels) from error
