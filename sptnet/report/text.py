"""What a dataset, a path or a run says of itself, as text that any page can hold. Escaping is the template's."""

import unicodedata

from sptnet.run.records import known

LONGEST = 160  # characters of a name or a path


def printable(text: object, longest: int = LONGEST) -> str:
    """One line in which everything is visible: controls, directions and bytes that are no text are written out."""
    told = str(text)
    if len(told) > longest:
        half = longest // 2 - 1
        told = f"{told[:half]} … {told[-half:]}"
    return "".join(character if _is_visible(character) else ascii(character)[1:-1] for character in told)


def _is_visible(character: str) -> bool:
    # categories C*: controls, marks of direction, lone surrogates; Zl, Zp: line and paragraph separators
    return unicodedata.category(character)[0] != "C" and unicodedata.category(character) not in ("Zl", "Zp")


def per_cent(share: float | None) -> str:
    """A share as per cent with one digit, or a dash."""
    return f"{100 * share:.1f}" if known(share) and share is not None else "-"
