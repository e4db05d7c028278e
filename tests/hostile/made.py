"""What hostile inputs are made of, and the one line that each must get."""

import io
import os
import signal
import struct
import tarfile
import zlib
from contextlib import contextmanager

import numpy as np
from PIL import Image
from sptnet_shards.make_shards import main


def encoded(kind="JPEG", width=6, height=4, value=0) -> bytes:
    written = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value % 256, np.uint8)).save(written, kind)
    return written.getvalue()


def long_png(width: int, height: int) -> bytes:
    """A tiny file of very many pixels: bits of one colour."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    squeezed = zlib.compressobj(9)
    row = bytes(1 + -(-width // 8))
    pixels = b"".join(squeezed.compress(row) for _ in range(height)) + squeezed.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def photos(root, classes=("ant", "bee", "cat"), each=4):
    """A folder of small images, each another one."""
    for c, name in enumerate(classes):
        for i in range(each):
            put(root / name / f"{i}.jpg", encoded(value=16 * c + 3 * i))
    return root


def tar_of(files) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return written.getvalue()


def samples(count=10, start=0):
    """Members of a WebDataset tar: images and labels of three classes."""
    return [
        (f"{i:03d}.{suffix}", encoded("PNG", value=7 * i) if suffix == "png" else str(i % 3).encode())
        for i in range(start, start + count)
        for suffix in ("png", "cls")
    ]


@contextmanager
def within(seconds: int):
    """Fail, not hang."""

    def stop(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(capsys, *argv) -> str:
    """The one error line that a command ends with; it neither raises nor hangs, and leaves no half-written file."""
    with within(20):
        assert main([os.fspath(argument) for argument in argv]) == 1
    told = capsys.readouterr().err
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, told
    assert told.splitlines()[-1] == errors[0]
    assert errors[0].isprintable()
    return errors[0]


def accepted(capsys, *argv) -> str:
    """What a command that goes well says on stderr."""
    with within(20):
        assert main([os.fspath(argument) for argument in argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().err


def told(capsys):
    """The one error that a command printed."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line
