"""Compiles the training step of a config and tells how long that took; `mljax.bench` runs it twice, as processes."""

import json
import sys
import time

from mljax.config.command import guarded

BEGAN = time.perf_counter()


def main(argv: list[str] | None = None) -> int:
    from mljax.bench.command import arguments, configured
    from mljax.bench.model import Model

    args, config_flags = arguments(sys.argv[1:] if argv is None else argv)
    model = Model(configured(config_flags, args), labels=args.labels)
    made = model.training(model.config.optim.batch_size)
    seconds = {"trace": made.trace_seconds, "compile": made.compile_seconds, "process": time.perf_counter() - BEGAN}
    print(json.dumps(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
