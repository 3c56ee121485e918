"""Scores of a split -> scores.npz -> metrics -> report.json -> the table that papers print.

python -m mljax.evaluate --workdir=runs/cmsg [--split=val] [--definition=env] [--checkpoint=best]
python -m mljax.evaluate --workdir=runs/zero_shot --labels=unseen [--config.data.name=csv --config.data.file=zoo.csv]
"""

import sys
from typing import Any

from mljax import metrics
from mljax.config.command import Parser, guarded
from mljax.config.derive import derive
from mljax.config.overrides import overridden
from mljax.errors import UserError, one_of


def main(argv: list[str] | None = None) -> int:
    parser = Parser("evaluate", __doc__)
    parser.add_argument("--workdir", required=True, help="run directory")
    parser.add_argument("--split", help="any split of the run's data set, e.g. val or 'trainval[-500:]'")
    parser.add_argument("--checkpoint", choices=("selected", "last", "best"), default="selected")
    parser.add_argument("--ema", action="store_true", help="score the averaged parameters")
    parser.add_argument("--definition", help="of average precision: raw, env, sklearn, 11point")
    parser.add_argument("--views", help="average over these views, e.g. 448,448:flip")
    parser.add_argument("--known", type=float, help="share of labels to give a system that predicts with known labels")
    parser.add_argument("--labels", help="of a zero-shot ML-Decoder: all of the data set, seen, unseen, or names")
    parser.add_argument(
        "--vectors", help="of labels that were not trained: a file, or glove; default: as the run has them"
    )
    args, overrides = parser.parse_overrides(argv)
    from mljax.run import load

    run = load(args.workdir, checkpoint=args.checkpoint, ema=args.ema or None, known=args.known)
    changes: dict[str, Any] = {}
    if args.definition:
        one_of("--definition", args.definition, metrics.DEFINITIONS)
        changes["eval.definition"] = args.definition
    if args.views:
        changes["cache.eval_views"] = tuple(args.views.split(","))
    for key, _ in overrides:
        if not key.startswith(("data.", "splits.", "input.eval.", "eval.")):
            raise UserError(
                f"--config.{key} cannot be changed after training; config.data, splits, input.eval and eval can."
            )
    config = overridden(derive(run.experiment.config, changes), overrides)
    run.with_config(config).evaluate(args.split, labels=args.labels, vectors=args.vectors)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
