"""Files that are no images, or images out of all proportion: none starts a program, crashes or takes gigabytes."""

import io

import pytest
import torch
from made import accepted, encoded, long_png, photos, put, refused
from PIL import Image
from sptnet_shards.conversion.images import BadImage, Resize, keep

from sptnet.data.augment import prepare
from sptnet.data.format.manifest import read_manifest
from sptnet.data.image import DecodeError, decode, resize


def saved(kind, mode="RGB"):
    written = io.BytesIO()
    Image.new(mode, (8, 8)).save(written, kind)
    return written.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(mark) (w) file closefile\nshowpage\n%%EOF\n"
OTHERS = {
    kind: saved(kind) for kind in ("PPM", "TGA", "PCX", "SGI", "ICO", "DDS", "PDF", "EPS", "JPEG2000", "IM", "AVIF")
}
TRUNCATED = {
    f"{kind} at {share}": encoded(kind, 40, 30)[: int(len(encoded(kind, 40, 30)) * share)]
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
    for share in (0.02, 0.1, 0.3, 0.5)
}
DAMAGED = {
    "empty": b"", "text": b"no image", "EPS": EPS, "EPS behind a JPEG's start": b"\xff\xd8\xff" + EPS,
    "PNG of nothing": b"\x89PNG\r\n\x1a\n", "zeros": bytes(1000), "JPEG of nothing": b"\xff\xd8\xff\xd9",
    "JPEG header only": b"\xff\xd8\xff\xc0\x00\x11\x08\x00\x08\x00\x08\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01\xff\xd9",
    "60,000 x 1": long_png(60_000, 1), "1 x 60,000": long_png(1, 60_000), "5,000 x 2": long_png(5_000, 2),
    "20,000 x 20,000": long_png(20_000, 1).replace((1).to_bytes(4, "big"), (20_000).to_bytes(4, "big"), 1),
    "TIFF of 0 pixels": saved("TIFF").replace(b"\x08\x00", b"\x00\x00"), "pickle": b"\x80\x04cos\nsystem\n(S'x'\ntR.",
    "gzip": b"\x1f\x8b\x08" + bytes(60), "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
} | OTHERS | TRUNCATED  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_does_not_decode(kind):
    with pytest.raises(DecodeError) as told:
        decode(DAMAGED[kind])
    assert str(told.value)
    assert len(str(told.value).splitlines()) == 1
    with pytest.raises(BadImage):
        Resize(32, "jpeg", 95)(DAMAGED[kind])


@pytest.mark.parametrize("kind", [kind for kind in DAMAGED if not kind.startswith("JPEG header")])
def test_what_no_shard_keeps(kind):
    with pytest.raises(BadImage):
        keep(DAMAGED[kind])


@pytest.mark.parametrize("raised", [MemoryError(), RuntimeError("x"), IndexError(), KeyError("x"), OverflowError("x")])
def test_whatever_a_reader_raises_is_a_bad_image(monkeypatch, raised):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(DecodeError):
        decode(encoded("PNG"))


def test_what_a_resize_may_make_is_bounded():
    thin = torch.zeros(3, 900, 1, dtype=torch.uint8)
    assert prepare("crop_flip", thin, 28).shape == (3, 28_800, 32)
    with pytest.raises(DecodeError, match="would become"):
        prepare("crop_flip", thin, 518)
    with pytest.raises(DecodeError, match="would become"):
        resize(thin, 60_000, 60_000)


@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
def test_an_image_that_the_format_cannot_hold_has_a_name(tmp_path, capsys, image_format):
    root = photos(tmp_path / "photos")
    put(root / "ant" / "long.png", long_png(900, 1))
    run = ["imagefolder", root, tmp_path / "out", "--old", "1", "--resize", "80", "--format", image_format]
    assert "ant/long.png cannot be stored" in refused(capsys, *run)
    accepted(capsys, *run, "--on-error", "skip")
    assert [skipped["file"] for skipped in read_manifest(tmp_path / "out").skipped] == ["ant/long.png"]


def test_nothing_is_started_in_any_command(tmp_path, capsys, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *a, **k: started.append(a))
    monkeypatch.setattr("os.system", started.append)
    root = photos(tmp_path / "photos")
    put(root / "bee" / "x.jpg", EPS)
    for options in ([], ["--resize", "16"]):
        told = refused(capsys, "imagefolder", root, tmp_path / f"out{len(options)}", "--old", "1", *options)
        assert "bee/x.jpg does not decode: is no image of JPEG, PNG" in told
    assert not started
