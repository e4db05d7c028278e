"""What lets a run in that does not fit: settings that change no number, each tried as the plan itself was."""

from collections.abc import Callable, Iterator

from sptnet.config import Config
from sptnet.plan.planned import Cluster, Trials

PIECES = 64  # as many micro-batches are tried at most


def memory_settings_that_fit(
    config: Config, cluster: Cluster, counted: Trials, trial_of: Callable[[Config], Trials]
) -> str:
    """Half a sentence: the settings under which it fits, as they were tried, or that none does.

    Args:
        counted: of the strategy that takes least.
        trial_of: counts another configuration under it.
    """
    tried = ""
    for settings in _ways(config, cluster, counted):
        changed = _with(config, settings)
        peak = max(found.peak for found in trial_of(changed).values())
        if peak <= cluster.usable:
            return f"it fits with {' '.join(settings)}: planned {in_words(peak)}"
        tried = " ".join(settings)
    if not tried:
        return "take a smaller model.backbone or model.image_size"
    return f"nor does it with {tried}: take more GPUs, or a smaller model.backbone or model.image_size"


def _ways(config: Config, cluster: Cluster, counted: Trials) -> Iterator[tuple[str, ...]]:
    """Settings to be tried, what costs least time first."""
    room = cluster.usable
    always: tuple[str, ...] = ()
    if counted["evaluation"].peak > room:
        if (images := _evaluated(config, counted, room)) == 0:
            return
        always = (f"evaluate.batch_size={images}",)
        if all(found.peak <= room for phase, found in counted.items() if phase != "evaluation"):
            yield always
            return
    always = (*always, "memory.gradient_checkpointing=full")
    if config.memory.gradient_checkpointing != "full":
        yield always
    pieces, images = 2 * config.memory.micro_batches, config.data.batch_size // cluster.ranks
    while pieces <= min(images, PIECES):
        yield (*always, f"memory.micro_batches={pieces}")
        pieces *= 2


def _evaluated(config: Config, counted: Trials, room: int) -> int:
    """Images of a forward pass of the evaluation that fit, a power of 2; 0 where the weights alone do not."""
    found = counted["evaluation"]
    growing = found.bytes["temporaries"] + found.bytes["activations"]
    images = int(0.9 * config.evaluate.batch_size * max(room - (found.peak - growing), 0) / growing)
    return 1 << (images.bit_length() - 1) if images else 0


def _with(config: Config, settings: tuple[str, ...]) -> Config:
    """A configuration with `section.key=value` of this module's."""
    for setting in settings:
        (section, key), value = setting.partition("=")[0].split("."), setting.partition("=")[2]
        changed = getattr(config, section).model_copy(update={key: int(value) if value.isdigit() else value})
        config = config.model_copy(update={section: changed})
    return config


def in_words(count: int) -> str:
    """Bytes, for a message."""
    return f"{count / 1e9:.1f} GB" if count > 1e8 else f"{count / 1e6:.1f} MB"
