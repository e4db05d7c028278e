"""All keys of a configuration, or what a configuration comes to.

Without a file: every key with its default and what it is. With one: the complete configuration that files, what they
inherit and overrides come to; nothing is started. What comes with sptnet has a name, also where there is no checkout:
accelerate launch --config_file "$(sptnet config --path launch/ddp)" -m sptnet train cub
"""

import argparse

from sptnet.arguments import path


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=path, nargs="?", help="a YAML file, or a name")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. seed=1 data.workers=8")
    command.add_argument("--path", metavar="NAME", help="the path of what comes with sptnet: launch/ddp, cub")
    command.add_argument("--schema", action="store_true", help="a JSON schema, which editors check and complete by")


def run(arguments: argparse.Namespace) -> int:
    """Print keys, schema or configuration."""
    import json

    import yaml

    from sptnet.config import Config
    from sptnet.config_file import load_config, published

    if arguments.path is not None:
        folder, _, name = arguments.path.rpartition("/")
        print(published("launch" if folder == "launch" else "configs", name))
    elif arguments.schema:
        print(json.dumps(Config.model_json_schema(), indent=1))
    elif arguments.config is None:
        print_keys()
    else:
        config = load_config(arguments.config, arguments.overrides)
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
    return 0


def print_keys() -> None:
    """A line per key, a paragraph per section."""
    from pydantic_core import PydanticUndefined

    from sptnet.config_file import keys_of

    section = ""
    for name, field in keys_of():
        above = name.rpartition(".")[0]
        if above != section:
            print()
            section = above
        default = field.get_default(call_default_factory=True)
        told = "(must be given)" if default is PydanticUndefined else "null" if default is None else str(default)
        print(f"{name} = {told}  # {' '.join((field.description or '').split())}".rstrip())
