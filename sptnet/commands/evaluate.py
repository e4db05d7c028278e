"""Evaluate a run's model again.

Evaluates model.safetensors of a run in this process, and writes its metrics.json. On several processes:
accelerate launch --config_file launch/ddp.yaml --num_processes N -m sptnet eval RUN
"""

import argparse
import sys

from sptnet.arguments import path


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", metavar="RUN", type=path, help="the run's folder")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="of data.root, data.remote, data.workers, evaluate., device and others that decide no number",
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and save; rank 0 prints the table, that of a run that may not be written too."""
    from sptnet.evaluate import evaluate_run, save_evaluation
    from sptnet.run.model_file import unfinished
    from sptnet.run.tables import collapse, print_table, table_of_results
    from sptnet.strategy.collectives import rank

    folder = arguments.run_folder
    config, manifest, results, predictions = evaluate_run(folder, arguments.overrides)
    how_far = unfinished(folder)
    try:
        save_evaluation(folder, config.method, manifest, results, predictions)
    finally:
        if rank() == 0:
            if how_far:
                print(how_far, file=sys.stderr)
            print_table(table_of_results([(folder, {"method": config.method, **results})]))
            for protocol, result in results.items():
                if told := collapse(result):
                    print(f"warning: {protocol}: {told}", file=sys.stderr)
    return 0
