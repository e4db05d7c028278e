"""Files that commands keep and read again (listings, tables, plans), damaged or named to do harm."""

import csv
import io
import json
import os

import numpy as np
import pytest

from sptnet.data.listing import ListedSource, ListingError, write_listing
from sptnet.data.table import encode_csv
from sptnet.discover.children import StageError
from sptnet.discover.diagnostics import groups_of, own_class_share
from sptnet.discover.saved_state import Choices, Estimated, Measured, is_kept, read_kept
from sptnet.report.page import _check_place
from sptnet.run.folder import RunError
from sptnet.run.parts import PartsError, begin_parts
from sptnet.run.tables import table_of_results

NAMES = ["a\rb.jpg", "a\nb.jpg", "a\r\nb.jpg", 'a"b.jpg', "a,b.jpg", "\udcff.jpg", "=1+1.jpg", " "]
HEAD = "path,class,class_name,is_new,confidence,nearest_old_class\n"
JSONS = [b"", b"[]", b"null", b"3", b"{", b"[" * 100_000, b"{}", b"\xff"]


def test_a_name_is_one_cell_whatever_it_holds():
    encoded = encode_csv({"path": NAMES, "n": np.arange(len(NAMES))})
    rows = list(csv.reader(io.StringIO(encoded.decode(errors="surrogateescape"), newline="")))
    assert rows == [["path", "n"], *([name, str(number)] for number, name in enumerate(NAMES))]
    assert encoded.count(b"\r\n") == 1  # rows end as they did


@pytest.mark.parametrize(
    "table",
    ["", "\0" * 50, HEAD + "a.jpg,0,cat", HEAD + "a.jpg,0,cat,True,high,cat\n", HEAD + "x" * 200_000 + ",0,c,True,1,c\n",
     "path,class_name\na,b\n", HEAD + "a.jpg,0,cat,True,0.5,cat,more\n"],
    ids=range(7),
)  # fmt: skip
@pytest.mark.parametrize("read", [groups_of, own_class_share])
def test_a_damaged_table_of_predictions_is_named(table, read, tmp_path):
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "part-000000.csv").write_text(table)
    with pytest.raises(StageError, match=r"part-000000\.csv is damaged .*remove it"):
        read(tmp_path)


@pytest.mark.parametrize("kind", [Choices, Estimated, Measured])
@pytest.mark.parametrize("content", [*JSONS, b'{"precision": 1, "resize": "x"}', b'{"costs": {"x": []}}'])
def test_a_damaged_file_of_a_journey_is_named(kind, content, tmp_path):
    (tmp_path / "kept.json").write_bytes(content)
    assert not is_kept(tmp_path / "kept.json", kind)
    with pytest.raises(StageError, match=r"kept\.json cannot be used .*remove it"):
        read_kept(tmp_path / "kept.json", kind)


@pytest.mark.parametrize("content", [content for content in JSONS if content != b"{}"])
def test_a_damaged_fingerprint_is_named(content, tmp_path):
    (tmp_path / "predict.json").write_bytes(content)
    with pytest.raises(PartsError, match=r"predict\.json is damaged"):
        begin_parts(tmp_path / "predict.json", {"images": "x"})


def npy(array):
    written = io.BytesIO()
    np.save(written, array)
    return written.getvalue()


LISTINGS = {
    "empty": b"", "a number": npy(np.int64(1)), "too short": npy(np.array([1])), "fractions": npy(np.array([1.0, 0, 2])),
    "a huge count": npy(np.array([10**15, 0, 2])), "backwards": npy(np.array([600, 0, 9, 3, 8])), "text": b"hello",
    "negative": npy(np.array([-5, 0])), "a header of a huge array": npy(np.zeros(3, np.int64))[:70].replace(b"(3,)", b"(9**9"),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTINGS)
def test_a_damaged_listing_is_named(name, tmp_path):
    write_listing(tmp_path, iter([b"a.jpg"]))
    (tmp_path / "listing.npy").write_bytes(LISTINGS[name])
    with pytest.raises(ListingError, match="remove the folder"):
        ListedSource(tmp_path, tmp_path)


def test_a_pipe_or_a_device_among_the_images_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "list").mkdir()
    write_listing(tmp_path / "list", iter([b"pipe.jpg", b"zero.jpg"]))
    samples = ListedSource(tmp_path / "list", tmp_path).read(0, range(2))
    assert [sample.error for sample in samples] == ["it is no regular file"] * 2


def test_a_page_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "page.html")
    with pytest.raises(RunError, match="is there and no page"):
        _check_place(tmp_path / "page.html")


def test_what_a_table_shows_is_text(tmp_path, capsys):
    from rich.console import Console

    result = {"all": 0.5, "old": 0.5, "new": 0.5, "samples": 3, "classes_used": 2, "effective_classes": 1.0}
    found = json.loads(json.dumps({"method": "[/x]\x1b]0;owned", "unlabelled": result}))
    Console(width=110).print(table_of_results([(tmp_path / "r\x1b[2J", found)]))
    out = capsys.readouterr().out
    assert "\x1b]0" not in out
    assert "\x1b[2J" not in out
    assert "[/x]" in out
