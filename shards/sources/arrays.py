"""A pickle of which nothing is run and no array is built but of single bytes (u1).

What a pickle of NumPy arrays names is replaced by stand-ins of ours that keep what they are given: not one function of
NumPy sees the file, for some crash on a forged dtype. The unpickler is the one in Python: the one in C can be made to
take memory without end by a single number.
"""

import io
import math
import pickle
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

# private by its name, documented in the library's own source since Python 3.0, and untyped
_Unpickler: Any = pickle._Unpickler


class NotArraysError(ValueError):
    """A pickle of something else than dictionaries, lists, texts, numbers and arrays of bytes."""


class Bytes:
    """Stands in for an array of single bytes while it is unpickled.

    Attributes:
        shape, order: its shape, and how its bytes lie, C or F, as the pickle says it.
        content: its bytes.
    """

    shape: tuple[int, ...] = ()
    order: Literal["C", "F"] = "C"
    content: bytes = b""

    def __setstate__(self, state: Any) -> None:
        # (version, shape, dtype, is Fortran-ordered, bytes), as NumPy's arrays are pickled
        if not isinstance(state, tuple) or len(state) != 5:
            raise NotArraysError("it has an array of unknown form")
        _, shape, dtype, fortran, content = state
        # Python 2 pickled bytes as text
        content = content.encode("latin1") if isinstance(content, str) else content
        self.set(content, dtype, shape, "F" if fortran else "C")

    def set(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
        plain = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
        if not isinstance(dtype, _U1) or order not in ("C", "F") or not plain or not isinstance(content, bytes):
            raise NotArraysError("it has an array that is not of single bytes")
        if math.prod(shape) != len(content):
            raise NotArraysError(f"it has an array of the shape {shape} and {len(content)} bytes")
        self.shape, self.order, self.content = shape, order, content

    def array(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.content, np.uint8).reshape(self.shape, order=self.order)


class _U1:
    """Stands in for the dtype of single bytes; its state says nothing that is needed."""

    def __setstate__(self, state: Any) -> None:
        pass


def _dtype(kind: Any = "", *_: Any) -> _U1:
    if kind not in ("u1", "|u1"):
        raise NotArraysError(f"it has an array of {ascii(kind)[:40]}, and only those of single bytes (u1) are read")
    return _U1()


def _reconstruct(*_: Any) -> Bytes:
    return Bytes()


def _from_buffer(content: Any = None, dtype: Any = None, shape: Any = None, order: Any = "C") -> Bytes:
    made = Bytes()
    made.set(content, dtype, shape, order)
    return made


class _ArraysOnly(_Unpickler):  # type: ignore[misc]
    """Finds nothing but the stand-ins, and makes nothing that is larger than the file."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Unpickler.dispatch)

    def __init__(self, encoded: bytes):
        super().__init__(io.BytesIO(encoded), encoding="latin1")
        self._left = len(encoded)
        self._stand_ins: dict[tuple[str, str], Any] = {
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy.core.numeric", "_frombuffer"): _from_buffer,
            ("numpy._core.numeric", "_frombuffer"): _from_buffer,
            ("numpy", "ndarray"): Bytes,
            ("numpy", "dtype"): _dtype,
            ("_codecs", "encode"): self._encode,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._stand_ins:
            raise NotArraysError(f"it names {ascii(module)[1:-1]}.{ascii(name)[1:-1]}, which has no place in CIFAR")
        return self._stand_ins[module, name]

    def _encode(self, text: Any = None, encoding: Any = None) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise NotArraysError("it has a text that is none")
        self._left -= len(text)  # one text could be encoded a million times
        if self._left < 0:
            raise NotArraysError("it has more bytes of arrays than of file")
        return text.encode("latin1")

    def _load_bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        if size > self._left:
            raise NotArraysError("it claims more bytes than the file has")
        self.append(bytes(self.read(size)))

    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray8  # the library's makes the array before it reads


def unpickled(encoded: bytes) -> dict[str, Any]:
    """The dictionary in a pickle, its arrays as `Bytes`; raises NotArraysError."""
    try:
        loaded = _ArraysOnly(encoded).load()
    except NotArraysError:
        raise
    except Exception as error:  # a damaged pickle makes the unpickler raise whatever it stumbles over
        raise NotArraysError(f"{type(error).__name__}: {error}") from None
    if not isinstance(loaded, dict):
        raise NotArraysError(f"it holds a {type(loaded).__name__}")
    return loaded
