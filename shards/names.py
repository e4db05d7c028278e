"""What the command line names, apart from what makes it: help and mistakes are told before torch is loaded."""

from typing import Literal

ImageFormat = Literal["jpeg", "webp", "png"]
SUFFIX: dict[str, str] = {"jpeg": "jpg", "webp": "webp", "png": "png"}  # of a member of that format
CONTACT_SHEET = "contact_sheet.png"
