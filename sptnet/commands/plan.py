"""Plan a run: memory, time, bytes, before it runs.

For every strategy and both phases: bytes of a GPU by kind, the largest batch, collectives, seconds of a step and what
bounds it, hours, energy, bytes on disk, and one recommendation. Planned, not measured: docs/plan.md says how, and how
far it may be off. Nothing is trained and nothing written.
"""

import argparse
from functools import partial
from pathlib import Path

from sptnet.arguments import ArgumentsError, positive

_few = partial(positive, most=10**6 - 1)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, help="a YAML file, or the name of one that comes with sptnet")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. data.batch_size=1024")
    command.add_argument("--nodes", type=_few, default=1, metavar="N", help="(default: %(default)s)")
    command.add_argument("--gpus", type=_few, default=8, metavar="G", help="of a node (default: %(default)s)")
    command.add_argument("--gpu", default="h100", help="h100, h200, a100, a100-pcie (default: %(default)s)")
    command.add_argument("--strategy", default="all", help="all, or one of launch/ (default: %(default)s)")
    command.add_argument("--precision", choices=["no", "bf16", "fp16"], default="bf16", help="(default: %(default)s)")
    command.add_argument("--network", type=float, metavar="GB/S", help="of a GPU to other nodes (default: 25, assumed)")
    command.add_argument("--price", type=float, metavar="P", help="of a GPU-hour, for the cost of the run")
    command.add_argument("--images", metavar="L,U,T", help="labelled, unlabelled, test, where the shards are not here")
    command.add_argument("--classes", metavar="OLD,NEW", help="likewise")
    command.add_argument("--calibrate", type=_few, metavar="IMAGES", nargs="?", const=4,
                         help="take real steps of so many images here, and say how far their plan is off")  # fmt: skip
    told = command.add_mutually_exclusive_group()
    told.add_argument("--json", action="store_true", help="for scripts")
    told.add_argument("--line", action="store_true", help="one line, as slurm/*.sbatch quote it")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 1 where the run fits nowhere."""
    import json
    import sys

    from rich.console import Console

    from sptnet.config_file import load_config
    from sptnet.plan.dataset import counts_of
    from sptnet.plan.hardware import BETWEEN_NODES, gpu
    from sptnet.plan.planning import STRATEGIES, Cluster, plan_run
    from sptnet.plan.seconds import Network
    from sptnet.plan.telling import as_facts, one_line, tell

    config = load_config(arguments.config, arguments.overrides)
    images, classes = (_numbers(arguments, name, count) for name, count in (("images", 3), ("classes", 2)))
    if (images is None) != (classes is None):
        raise ArgumentsError("--images and --classes go together")
    counts = counts_of(config, images, classes)  # type: ignore[arg-type]
    names = STRATEGIES if arguments.strategy == "all" else (arguments.strategy,)
    if unknown := set(names) - set(STRATEGIES):
        raise ArgumentsError(f"--strategy {unknown.pop()}: use all, {', '.join(STRATEGIES)}")
    between = BETWEEN_NODES if arguments.network is None else arguments.network * 1e9
    if between <= 0 or (arguments.price or 0) < 0:
        raise ArgumentsError("--network is more than 0 GB/s, and --price is not negative")
    if arguments.calibrate is not None:
        return _calibrate(config, counts, arguments.calibrate)
    cluster = Cluster(
        arguments.nodes, arguments.gpus, gpu(arguments.gpu), arguments.precision, Network(arguments.gpus, between)
    )
    plan = plan_run(config, counts, cluster, names, largest=not arguments.line)
    if arguments.json:
        print(json.dumps(as_facts(plan, arguments.price), indent=1))
    elif arguments.line:
        print(one_line(plan))
    else:
        tell(plan, arguments.price, Console(width=None if sys.stdout.isatty() else 180))
    return 0 if plan.recommended[0] is not None else 1


def _calibrate(config: object, counts: object, images: int) -> int:
    from rich.console import Console
    from rich.table import Table

    from sptnet.plan.calibrate import calibrate

    machine, taken = calibrate(config, counts, images)  # type: ignore[arg-type]
    table = Table(title=f"Steps on this machine ({machine.name}), s", title_justify="left")
    for column in ("phase", "images", "measured", "planned", "planned, calibrated", "off"):
        table.add_column(column, justify="right")
    for step in taken:
        off = f"{step.calibrated / step.measured - 1:+.0%}"
        seconds = (f"{value:.4f}" for value in (step.measured, step.planned, step.calibrated))
        table.add_row(step.phase, str(step.images), *seconds, off)
    Console(width=110).print(table)
    return 0


def _numbers(arguments: argparse.Namespace, name: str, count: int) -> tuple[int, ...] | None:
    if (text := getattr(arguments, name)) is None:
        return None
    parts = text.split(",")
    if len(parts) != count or not all(part.isascii() and part.isdigit() and len(part) < 13 for part in parts):
        raise ArgumentsError(f"--{name} {text}: {count} numbers with commas between them are needed")
    return tuple(map(int, parts))
