"""From YAML files and `section.key=value` overrides to a configuration; every mistake is a line that says where."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sptnet.config import Config, ConfigError
from sptnet.config_sections import ModelConfig
from sptnet.data.format.files import without_password
from sptnet.yaml_text import parse_yaml

LARGEST_FILE = 2**20  # bytes
DEEPEST_KEY = 8  # dots in a dotted key
QUOTED = ("'", '"', "[", "{")  # what a value begins with in which YAML takes all as it is, or says what it does not
CUT_OFF = re.compile(r"\s#|\S\s*\n\s*\S")
# what a model must share with the run that it begins from
OF_INIT = ("backbone", "backbone_options", "image_size", "num_new", "head_hidden", "head_bottleneck")


def published(folder: str, name: str) -> Path:
    """The path of a file that comes with the project: beside the package in a wheel, beside its folder in a checkout.

    Args:
        folder: configs or launch.
        name: of a YAML file, with or without its suffix.

    Raises:
        ConfigError: there is none of this name; the message lists those that are there.
    """
    package = Path(__file__).parent
    home = next(path for path in (package / folder, package.parent / folder) if path.is_dir())
    path = home / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in home.glob("*.yaml")))
        if Path(name).is_dir():
            raise ConfigError(f"{name} is a folder: name a configuration in it, or one of these: {names}")
        raise ConfigError(f"{name}: there is no such file, and no configuration of that name: {names}")
    return path


def load_config(path: str | Path, overrides: Sequence[str] = (), *, complete: bool = False) -> Config:
    """Read a configuration.

    Args:
        path: a YAML file, or the name of one that comes with the project (`cub`); `base: other.yaml`, beside it, is
            what it inherits from.
        overrides: `section.key=value`, applied last, the value being YAML.
        complete: as a run has saved it, and not to be told a model by the run that `init` names, which may be another
            one by now.

    Raises:
        ConfigError: one line per mistake.
    """
    path = _expanded(path)
    if path.parent == Path() and (path.is_dir() or not path.exists()):  # a dataset's folder may be called like it
        path = published("configs", path.name)
    own, whole = _read_yaml(path)
    given: dict[str, str] = {}
    for override in overrides:
        key, value = read_override(override)
        given[key] = override
        for part in reversed(key.split(".")):
            value = {part: value}
        own, whole = (_merged(raw, _long_form(value)) for raw in (own, whole))
    try:
        config = Config.model_validate(whole if complete else _with_model_of_init(whole, own, path))
        _check_allowed(config, path, given)
        return config
    except ValidationError as error:
        raise ConfigError("\n".join(_sentences(error, path, given))) from None


def _check_allowed(config: Config, path: Path, given: dict[str, str]) -> None:
    """What may differ from a checkpoint must be a key, or a section, or one of those that no key names."""
    names = [name for name, _ in keys_of()]
    known = {*names, "backbone", "precision", "world_size", "data.digest"}
    known |= {name.rsplit(".", level)[0] for name in names for level in range(1, name.count(".") + 1)}
    for key in config.resume.allow:
        if key not in known:
            told = f"resume.allow has {key!r}, which is no key{did_you_mean(key, sorted(known))}"
            raise ConfigError(f"{_where('resume.allow', told, path, given)}: {told}")


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file says itself, and that merged into what it inherits."""
    try:
        if path.resolve() in seen:
            raise ConfigError(f"{path}: `base:` leads back to this file")
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder, not a YAML file")
        with open(path, "rb") as file:
            encoded = file.read(LARGEST_FILE + 1)
        if len(encoded) > LARGEST_FILE:
            raise ConfigError(f"{path}: is larger than {LARGEST_FILE:,} bytes, which no configuration is")
        raw = parse_yaml(encoded.decode(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text in UTF-8 ({error.reason} at byte {error.start})") from None
    except ConfigError:
        raise
    except ValueError as error:  # a path with a NUL
        raise ConfigError(f"{str(path)!r}: cannot be read ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping of sections")
    base = raw.pop("base", None)
    raw = _long_form(raw)
    if base is None:
        return raw, raw
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base is {base!r}, it should be the path of a YAML file")
    below = path.parent / _expanded(base)
    if not below.exists() and Path(base).parts[:1] == ("configs",):  # outside of a checkout too
        below = published("configs", Path(base).name)
    return raw, _merged(_read_yaml(below, (*seen, path.resolve()))[1], raw)


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{str(path)[:200]}: {error}") from None


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        # backbone_options are one value: a file that names another model does not inherit half of them
        if isinstance(below, dict) and isinstance(value, dict) and key != "backbone_options":
            value = _merged(below, value)
        merged[key] = value
    return merged


def _long_form(raw: dict[str, Any]) -> dict[str, Any]:
    """`resume: auto` is short for `resume: {source: auto}`; in the long form files and overrides add up."""
    if isinstance(raw.get("resume"), str):
        return raw | {"resume": {"source": raw["resume"]}}
    return raw


def read_override(override: str) -> tuple[str, Any]:
    """Dotted key and value of `section.key=value`. Raises ConfigError."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"override {override[:80]!r}: should be section.key=value")
    if key.count(".") > DEEPEST_KEY:
        raise ConfigError(f"override {override[:80]!r}: no key has that many parts")
    if not text.lstrip().startswith(QUOTED) and CUT_OFF.search(text):
        raise ConfigError(f"override {override[:80]!r}: YAML would cut the value at ' #' or a line break: quote it")
    return key, parse_yaml(text, f"override {override[:80]!r}") if text.strip() else ""


def _with_model_of_init(whole: dict[str, Any], own: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration with the model of the run that it begins from, which a base file cannot know.

    Raises:
        ConfigError: the file itself, or an override, says another model.
    """
    init = whole.get("init")
    if not isinstance(init, str) or "\0" in init or not (file := _expanded(init) / "config.yaml").is_file():
        return whole
    try:
        theirs = ModelConfig.model_validate(_read_yaml(file)[1].get("model", {}))
        told: dict[str, Any] = own["model"] if isinstance(own.get("model"), dict) else {}
        ours = ModelConfig.model_validate({key: value for key, value in told.items() if key in OF_INIT})
    except ValidationError:
        return whole  # what is wrong is said where the whole is validated, or the run is read
    for key in OF_INIT:
        if key in told and getattr(ours, key) != getattr(theirs, key):
            raise ConfigError(
                f"{path}: model.{key} is {getattr(ours, key)!r}, but init {init} was trained with "
                f"{getattr(theirs, key)!r}: leave it out, the model is taken from init"
            )
    return _merged(whole, {"model": {key: getattr(theirs, key) for key in OF_INIT}})


def keys_of(section: type[BaseModel] = Config, above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and pydantic field of every key, section by section."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys_of(kind, f"{above}{name}.")
        else:
            yield f"{above}{name}", field


def did_you_mean(key: str, known: Sequence[str]) -> str:
    """`: did you mean data.batch_size?`, or nothing where no known key is near."""
    last = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]  # in another section
    near = last or difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    return f": did you mean {near[0]}?" if near else "; `sptnet config` lists all keys"


def _sentences(error: ValidationError, path: Path, given: dict[str, str]) -> Iterator[str]:
    """A line per key that is wrong; of a key that may be of several kinds, why it is none of them."""
    by_key: dict[str, list[dict[str, Any]]] = {}
    for one in error.errors():
        known = [part for part in one["loc"] if isinstance(part, int) or part.replace("_", "").islower()]
        # pydantic names the kinds that it tried behind the key: `literal[...]`, `Every`
        key = ".".join(str(part) for part in known if "[" not in str(part))
        by_key.setdefault(key if one["type"] != "extra_forbidden" else ".".join(map(str, one["loc"])), []).append(
            dict(one)
        )
    for key, errors in list(by_key.items())[:20]:
        told = " ".join(_sentence(key, errors).split())
        yield f"{_where(key, told, path, given)}: {told}"


def _sentence(key: str, errors: Sequence[dict[str, Any]]) -> str:
    first = errors[0]
    match first["type"]:
        case "extra_forbidden":
            return f"{key} is not a known key{did_you_mean(key, [name for name, _ in keys_of()])}"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            return str(first["ctx"]["error"])
        case _:
            value = repr(first["input"]) if isinstance(first["input"], str) else str(first["input"])
            wanted = " or ".join(e["msg"].partition(" should ")[2] or e["msg"] for e in errors)
            return f"{key} is {value[:80]}, it should {wanted}"


def _where(key: str, told: str, path: Path, given: dict[str, str]) -> str:
    """The override that is to blame, or the file; `key` is empty where several keys do not go together."""
    words = told.replace(",", " ").split()
    for name, override in given.items():
        of_key = f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.")
        if of_key if key else name in words or words[:1] == [name.partition(".")[0]]:
            return f"override {without_password(override)[:80]!r}"
    return str(path)
