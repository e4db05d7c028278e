"""YAML as configurations have it: JSON's types, no key twice, bounded in depth and number."""

import re
from typing import Any, ClassVar

import yaml

from sptnet.config import ConfigError

MOST_VALUES = 10_000  # of a file, aliases counted as often as they are used
DEEPEST = 20  # mappings and lists in one another
OCTAL = re.compile(r"[-+]?0[0-9_]+")  # seed=010 is 8 to YAML 1.1


class _Loader(yaml.SafeLoader):
    """YAML's plain types, without a key that is there twice: of the two one would be lost in silence.

    And without what YAML 1.1 has beside JSON's types: dates and numbers like 1:30 are text, merges are refused (a few
    hundred bytes of them make billions of keys).
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "merge keys (<<) are not supported: `base:` inherits", key.start_mark
                )  # fmt: skip

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        if ":" in node.value:
            return str(node.value)
        if OCTAL.fullmatch(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value} begins with 0, which YAML takes for octal: leave it out", node.start_mark
            )
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)

    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        **yaml.SafeLoader.yaml_constructors,
        "tag:yaml.org,2002:int": construct_number,
        "tag:yaml.org,2002:float": construct_number,
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name} appears twice", key.start_mark
                )  # fmt: skip
            seen.add(name)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; raises ConfigError, one line."""
    try:
        value = yaml.load(text, _Loader)
        _bounded(value)
    except RecursionError:
        raise ConfigError(f"{where}: is nested too deeply") from None
    # what is no number behind !!int, and the like, raises whatever it comes to
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{where}: is not valid YAML ({' '.join(str(error).split())[:300]})") from None
    return value


def _bounded(value: Any) -> None:
    left, stack = MOST_VALUES, [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, dict | list):
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} deep")
            stack.extend((inner, depth + 1) for inner in (item.values() if isinstance(item, dict) else item))
            if isinstance(item, dict) and (odd := [key for key in item if not isinstance(key, str)]):
                raise ValueError(f"the key {odd[0]!r} is not a string")
        elif isinstance(item, int) and abs(item) >= 2**64:
            raise ValueError("a whole number of more than 64 bits")
        elif isinstance(item, str):
            item.encode()  # a half of a pair of surrogates, by its number, raises UnicodeEncodeError
        elif item is not None and not isinstance(item, bool | int | float):
            raise ValueError(f"values of type {type(item).__name__} are not supported")
        left -= 1
        if left < 0:
            raise ValueError(f"more than {MOST_VALUES} values")
