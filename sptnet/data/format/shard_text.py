"""Columns as JSON: of a million shards in half the time that their objects take one by one."""

from collections.abc import Mapping
from json.encoder import encode_basestring_ascii
from typing import Any

import numpy as np
from numpy.typing import NDArray

PLAIN = b"\0abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-."  # of names that JSON has as they are
HEX = np.frombuffer("".join(f"{value:02x}" for value in range(256)).encode(), np.uint16)


def json_objects(columns: Mapping[str, NDArray[Any]]) -> bytes:
    """Objects as `json.dumps` writes those of a list, without its brackets.

    Args:
        columns: by key, in the order of the text, what every object has there: bytes [n], names without zeros of their
            own; int64 [n], counts; or uint8 [n, 32], digests, which are told in hexadecimal.
    """
    count = len(next(iter(columns.values())))
    parts: list[NDArray[np.uint8]] = []
    for key, values in columns.items():
        parts += [_every(f', "{key}": ' if parts else f'{{"{key}": ', count), _told(values)]
    text = np.concatenate([*parts, _every("}, ", count)], 1).tobytes()
    return text.replace(b"\0", b"").removesuffix(b", ")


def _every(text: str, count: int) -> NDArray[np.uint8]:
    return np.broadcast_to(np.frombuffer(text.encode(), np.uint8), (count, len(text)))


def _told(values: NDArray[Any]) -> NDArray[np.uint8]:
    """[n] -> text [n, length], with zeros where a row has less."""
    if values.dtype == np.int64:
        return _decimal(values)
    return _between_quotes(HEX[values].view(np.uint8)) if values.dtype == np.uint8 else _quoted(values)


def _decimal(values: NDArray[np.int64]) -> NDArray[np.uint8]:
    powers = 10 ** np.arange(len(str(values.max())))[::-1]
    told = (values[:, None] >= powers) | (powers == 1)
    return np.where(told, values[:, None] // powers % 10 + ord("0"), 0).astype(np.uint8)


def _quoted(names: NDArray[np.bytes_]) -> NDArray[np.uint8]:
    text = names.tobytes()
    if not text.translate(None, PLAIN):
        return _between_quotes(np.frombuffer(text, np.uint8).reshape(len(names), -1))
    quoted = np.array([encode_basestring_ascii(name.decode()) for name in names.tolist()], np.bytes_)
    return quoted.view(np.uint8).reshape(len(names), -1)


def _between_quotes(text: NDArray[np.uint8]) -> NDArray[np.uint8]:
    quote = _every('"', len(text))
    return np.concatenate([quote, text, quote], 1)
