"""Tars that are cut, damaged or made to harm: damage is an error, never the end of the archive."""

import json
import os
import tarfile

import pytest
from made import accepted, encoded, put, refused, samples, tar_of
from sptnet_shards.source import SourceError
from sptnet_shards.sources import imagenet

from sptnet.data.format.manifest import KINDS, read_manifest

SOUND = tar_of(samples())
HEADERS = [at for at in range(0, len(SOUND), 512) if SOUND[at + 257 : at + 262] == b"ustar"]


def member(name="x.png", kind=tarfile.REGTYPE, size=0, content=b"", **fields) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def with_size(field: bytes) -> bytes:
    header = bytearray(SOUND[:512])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + SOUND[512:]


def pax(record: bytes) -> bytes:
    text = b"%d %s" % (len(record) + 3, record)
    return member("h", tarfile.XHDTYPE, len(text), text) + SOUND


END = SOUND.rstrip(b"\0")
END += bytes(-len(END) % 512)
BAD = {f"cut at {at}": SOUND[:at] for at in range(100, len(END) + 513, 700)}
BAD |= {f"header {at} zeroed": SOUND[:at] + bytes(512) + SOUND[at + 512 :] for at in HEADERS}
BAD |= {f"header {at} damaged": SOUND[: at + 130] + b"x" + SOUND[at + 131 :] for at in HEADERS}
BAD |= {f"header {at} of 0xff": SOUND[:at] + b"\xff" * 512 + SOUND[at + 512 :] for at in HEADERS}
BAD |= {
    "empty file": b"",
    "text": b"no tar" * 200,
    "gzip": b"\x1f\x8b\x08" + bytes(2000),
    "one empty block": END + bytes(512),
    "two in one": SOUND + SOUND,
    "something behind": SOUND + b"x",
    "no end": END,
    "negative size": with_size(b"\xff" * 11 + b"\0"),
    "size that is none": with_size(b"zzzzzzzzzzz\0"),
    "size beyond the end": with_size(b"77777777777\0"),
    "huge size": with_size(b"\x80" + b"\xff" * 11),
    "pax size beyond the end": pax(b"size=99999999999\n"),
    "pax size that is none": pax(b"size=-1024\n"),
    "pax of no length": member("h", tarfile.XHDTYPE, 9, b"x size=1\n") + SOUND,
    "sparse": pax(b"GNU.sparse.major=1\n"),
    "pax for all": member("h", tarfile.XGLTYPE, 12, b"12 path=abc\n") + SOUND,
    "pax without a member": member("h", tarfile.XHDTYPE, 12, b"12 path=abc\n") + bytes(1024),
    "long name of 2 GB": member("n", tarfile.GNUTYPE_LONGNAME, 2**31 - 1) + SOUND,
    "link": member(kind=tarfile.SYMTYPE, linkname="/etc/passwd") + SOUND,
    "device": member(kind=tarfile.CHRTYPE) + SOUND,
    "hard link": member(kind=tarfile.LNKTYPE, linkname="a") + SOUND,
    "FIFO": member(kind=tarfile.FIFOTYPE) + SOUND,
    "GNU sparse": member(kind=tarfile.GNUTYPE_SPARSE) + SOUND,
    "unknown type": member(kind=b"Z") + SOUND,
    "folder with content": member("d", tarfile.DIRTYPE, 512, bytes(512)) + SOUND,
    "image twice": tar_of([*samples(), *samples(1)]),
    "no label": tar_of([*samples(), ("x.png", encoded())]),
    "empty image": tar_of([*samples(), ("x.png", b""), ("x.cls", b"1")]),
    "no images": tar_of([("x.cls", b"1")]),
    "label twice": tar_of([*samples(), ("x.cls", b"1"), ("x.cls", b"2"), ("x.png", encoded())]),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_tar_that_is_no_archive_of_samples(kind, tmp_path, capsys):
    put(tmp_path / "train-0.tar", BAD[kind])
    assert "train" in refused(capsys, "index", tmp_path, "--old", "1")
    assert set(os.listdir(tmp_path)) - {"conversion"} == {"train-0.tar"}


@pytest.mark.parametrize("kind", [kind for kind in BAD if "header" in kind][::7])
def test_damage_inside_of_the_tar_of_tars(kind, tmp_path):
    put(tmp_path / imagenet.TRAIN_TAR, tar_of([("n00000001.tar", SOUND), ("n00000002.tar", BAD[kind])]))
    with pytest.raises(SourceError, match=r"img_train\.tar cannot be read as a tar"):
        imagenet.source("imagenet1k", tmp_path)


JSON = {
    "deep": b"[" * 100_000,
    "no key": b"{}",
    "a list": b"[1]",
    "true": b'{"label": true}',
    "null": b'{"label": null}',
    "real": b'{"label": 1.5}',
    "object": b'{"label": {}}',
    "NaN": b'{"label": NaN}',
    "binary": b"\x80\x04",
    "empty": b"",
}
LABELS = {
    "superscript": "²",
    "empty": "",
    "control": "a\x1b[2J",
    "markup": "[red]a",
    "long": "x" * 5000,
    "digits": "9" * 5000,
    "two lines": "a\nb",
    "01 beside 1": "01",
}


@pytest.mark.parametrize("kind", JSON)
def test_a_json_without_a_label(kind, tmp_path, capsys):
    put(tmp_path / "train-0.tar", tar_of([*samples(), ("x.png", encoded()), ("x.json", JSON[kind])]))
    assert "is --json-key right?" in refused(capsys, "index", tmp_path, "--old", "1")


@pytest.mark.parametrize("kind", [kind for kind in LABELS if kind != "superscript"])
def test_a_label_that_is_no_class(kind, tmp_path, capsys):
    put(tmp_path / "train-0.tar", tar_of([*samples(), ("x.png", encoded()), ("x.cls", LABELS[kind].encode())]))
    refused(capsys, "index", tmp_path, "--old", "1")


def renamed(names, labels):
    return tar_of(
        [
            (f"{names(i)}.{suffix}", encoded("PNG", value=9 * i) if suffix == "png" else labels(i).encode())
            for i in range(12)
            for suffix in ("png", "cls")
        ]
    )


SOUND_ONES = {
    "1-based": renamed(str, lambda i: str(i % 3 + 1)),
    "names": renamed(str, lambda i: "abc"[i % 3]),
    "01": renamed(str, lambda i: f"{i % 3 + 1:02d}"),
    "dotted folder": renamed(lambda i: f"a.b/c.d/{i}", lambda i: str(i % 3)),
    "uid-like names": renamed(lambda i: f"{99 - i:09d}", lambda i: str(i % 3)),
    "spaces": renamed(str, lambda i: f" {i % 3}\n"),
    "superscripts": renamed(str, lambda i: "²³¹"[i % 3]),
    "folders": member("d/", tarfile.DIRTYPE) + SOUND,
    "pax": pax(b"mtime=1.5\n"),
    "long name": renamed(lambda i: "d/" * 70 + str(i), lambda i: str(i % 3)),
}


def of_img2dataset(i):
    """What stands in a .json beside the label; where a column has no value, pandas makes NaN of it."""
    return json.dumps({"caption": None, "url": "https://x/y.jpg", "similarity": float("nan"), "label": i % 3}).encode()


SOUND_ONES["img2dataset"] = tar_of(
    [
        (f"{i:09d}.{suffix}", {"jpg": encoded(value=9 * i), "json": of_img2dataset(i), "txt": b""}[suffix])
        for i in range(12)
        for suffix in ("jpg", "json", "txt")
    ]
)


@pytest.mark.parametrize("kind", SOUND_ONES)
def test_a_sound_indexed_dataset_is_sound(kind, tmp_path, capsys):
    put(tmp_path / "train-0.tar", SOUND_ONES[kind])
    put(tmp_path / "train-1.tar", tar_of(samples(6, 20)) if "uid" in kind else SOUND_ONES[kind] + bytes(512))
    accepted(capsys, "index", tmp_path, "--old", "1")
    accepted(capsys, "verify", tmp_path, "--decode")
    assert sum(read_manifest(tmp_path).samples(k) for k in KINDS) >= 18


def test_parts_that_overlap(tmp_path, capsys):
    put(tmp_path / "train-0.tar", SOUND)
    put(tmp_path / "test-0.tar", tar_of(samples(5, 50)))
    assert "is for training and for testing" in refused(capsys, "index", tmp_path, "--old", "1", "--test", "*.tar")
    put(tmp_path / "test-1.tar", SOUND)
    assert "are the same tar" in refused(capsys, "index", tmp_path, "--old", "1")


@pytest.mark.parametrize("pattern", ["", "/etc/*", "../*.tar", "**", "[", "\x00"])
def test_patterns(pattern, tmp_path, capsys):
    put(tmp_path / "data" / "train-0.tar", SOUND)
    if pattern == "**":
        accepted(capsys, "index", tmp_path / "data", "--old", "1", "--train", pattern)
    else:
        refused(capsys, "index", tmp_path / "data", "--old", "1", "--train", pattern)


@pytest.mark.parametrize("planted", ["manifest.json.tmp", "train-0.labelled.idx.npy", "train-0.unlabelled.idx.npy.tmp"])
def test_index_writes_through_no_link(planted, tmp_path, capsys):
    victim = put(tmp_path / "victim", b"precious")
    put(tmp_path / "data" / "train-0.tar", SOUND)
    (tmp_path / "data" / planted).symlink_to(victim)
    accepted(capsys, "index", tmp_path / "data", "--old", "1")
    assert victim.read_bytes() == b"precious"
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["shards"]
