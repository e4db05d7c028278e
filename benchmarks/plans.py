"""The plans of all configurations on one kind of machine, as a table for docs/plan.md; planned, not measured."""

import argparse
import sys
from pathlib import Path

from sptnet.config_file import load_config
from sptnet.plan.dataset import counts_of
from sptnet.plan.hardware import PlanError, gpu
from sptnet.plan.planned import Cluster
from sptnet.plan.planning import plan_run
from sptnet.plan.seconds import Network

CONFIGS = Path(__file__).parents[1] / "configs"
COLUMNS = ("config", "steps", "GB of a GPU", "prompt step, ms", "model step, ms", "hours", "GPU-hours", "kWh at most")


def row(path: Path, cluster: Cluster, strategy: str) -> list[str]:
    """A line of the table; raises PlanError."""
    config = load_config(path)
    plan = plan_run(config, counts_of(config, None, None), cluster, [strategy], largest=False)  # type: ignore[list-item]
    line = plan.lines[0]
    steps = [
        f"{1e3 * line.seconds[phase].total:.1f} ({line.seconds[phase].bound})" if phase in plan.steps else ""
        for phase in ("prompt", "model")
    ]
    hours = line.hours * cluster.ranks
    energy = "?" if cluster.machine.watts is None else f"{hours * cluster.machine.watts / 1000:.1f}"
    told = [path.stem, f"{sum(plan.steps.values()):,}", f"{line.peak / 1e9:.1f}", *steps, f"{line.hours:.2f}"]
    return [*told, f"{hours:.1f}", energy]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--strategy", default="ddp")
    options = parser.parse_args()
    cluster = Cluster(options.nodes, options.gpus, gpu(options.gpu), "bf16", Network(options.gpus))
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for path in sorted(CONFIGS.glob("*.yaml")):
        text = path.read_text()
        if "\nrun:" not in text:
            continue  # what others inherit from
        try:
            print("| " + " | ".join(row(path, cluster, options.strategy)) + " |", flush=True)
        except PlanError as error:
            print(f"{path.stem}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
