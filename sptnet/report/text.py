"""What a dataset, a path or a run says of itself, as text that any page can hold. Escaping is the template's."""

from sptnet.errors import visible
from sptnet.run.records import known

LONGEST = 160  # characters of a name or a path


def printable(text: object, longest: int = LONGEST) -> str:
    """One line in which everything is visible: controls, directions and bytes that are no text are written out."""
    told = str(text)
    if len(told) > longest:
        half = longest // 2 - 1
        told = f"{told[:half]} … {told[-half:]}"
    return visible(told)


def per_cent(share: float | None) -> str:
    """A share as per cent with one digit, or a dash."""
    return f"{100 * share:.1f}" if known(share) and share is not None else "-"
