"""The page of a run: what it shows is what the run did, it keeps its size, and nothing in it can do anything."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from sptnet_shards.make_shards import main as make_shards

from sptnet.cli import main
from sptnet.data.format.manifest import MANIFEST, read_manifest
from sptnet.report.categories import read_predictions
from sptnet.report.confusion import confusion_of
from sptnet.report.curves import BINS, Steps
from sptnet.report.inference import HALF
from sptnet.trained import TrainedRun

HOSTILE = "</style></script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&lt;"


class Elements(HTMLParser):
    """Elements of a page with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag, **attributes):
        found = [given for name, given in self.elements if name == tag]
        return [one for one in found if all(one.get(name) == value for name, value in attributes.items())]


def page_of(path):
    return Elements(path.read_text(encoding="utf-8"))


def picture(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@pytest.fixture(scope="module", autouse=True)
def few_are_mapped():
    """A map of few images: t-SNE of a thousand takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sptnet.report.embedding.MAPPED", 200)
        yield


@pytest.fixture(scope="module")
def evaluated(untrained, tmp_path_factory) -> Path:
    """A run with an evaluation, and with what training tells of its steps."""
    run = Path(shutil.copytree(untrained, tmp_path_factory.mktemp("evaluated") / "run"))
    assert main(["eval", str(run)]) == 0
    lines = []
    for step in range(200):
        phase = "prompt" if step // 20 % 2 == 0 else "model"
        record = {"step": step, "phase": phase, "total": 3 - step / 100, "me_max": 0.1, "classes_used": 4}
        lines.append(json.dumps(record))
    metrics = json.loads((run / "metrics.json").read_text())
    lines.append(json.dumps({"step": 200, "evaluation": {"unlabelled": metrics["unlabelled"], "test": None}}))
    (run / "metrics.jsonl").write_text("\n".join([*lines, "damaged", '{"step": 1, "phase": []}']) + "\n")
    return run


@pytest.fixture(scope="module")
def page(evaluated, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "new" / "page.html"
    assert main(["report", str(evaluated), "--html", str(path)]) == 0
    return path


def test_galleries_show_the_most_and_the_least_confident(evaluated, digits, page):
    told = page_of(page)
    found = read_predictions(evaluated)["unlabelled"]
    sizes = {str(c): int(n) for c, n in zip(*np.unique(found.category, return_counts=True), strict=True)}
    categories = told.of("details", **{"class": "category"})
    assert {one["id"][1:]: int(one["data-size"]) for one in categories} == sizes
    assert [int(one["data-size"]) for one in categories] == sorted(sizes.values(), reverse=True)
    sprites = [one for one in told.of("img") if "data-src" in one]
    assert len(sprites) == len(sizes) >= 3
    assert all("src" not in one for one in sprites)
    assert picture(sprites[0]["data-src"]).size == (96 * HALF, 96 * 2)
    assert len(told.of("details", **{"class": "names"})) == len(sprites)  # what is not only under a mouse
    # the confidences are those of the run for these very images
    run, first = TrainedRun(evaluated), categories[0]
    number = int(first["id"][1:])
    from sptnet.data.augment import eval_view
    from sptnet.data.blocks import ShardSource
    from sptnet.data.image import decode
    from sptnet.data.storage.store import LocalStore

    source = ShardSource(LocalStore(digits), ["unlabelled"])
    samples = [s for part in range(len(source)) for s in source.read(part, range(source.size(part)))]
    samples = [s for s in samples if found.category[np.searchsorted(found.uid, s.uid)] == number]
    views = torch.stack([eval_view(run.encoder.augment, decode(s.encoded), run.encoder.image_size) for s in samples])
    shares = torch.softmax(run.forward(views).logits.double() / run.temperature, 1)[:, number].numpy()
    assert float(first["data-confidence"]) == pytest.approx(shares.mean(), abs=1e-4)
    order = np.argsort(-shares, kind="stable")
    titles = [one["title"] for one in told.of("li") if "confidence" in one.get("title", "")][: 2 * HALF]
    expected = [*order[:HALF], *order[-HALF:]]
    np.testing.assert_allclose([float(t.rsplit(" ", 1)[1]) for t in titles], shares[expected], atol=2e-3)
    assert {t.partition(":")[0] for t in titles} <= {s.path for s in samples}
    # purity is over all images of the category
    known = found.target[found.category == number]
    assert float(first["data-purity"]) == pytest.approx(np.bincount(known).max() / len(known), abs=1e-4)
    cosines = run.forward(views).logits[:, : run.classes.num_old].mean(0)
    assert float(first["data-novelty"]) == pytest.approx(1 - float(cosines.max()), abs=1e-3)


def test_it_has_map_confusion_prompts_curves_and_history(page, evaluated):
    told, text = page_of(page), page.read_text(encoding="utf-8")
    assert {"runs", "categories", "map", "confusion", "prompts", "curves", "history"} <= {
        one.get("id") for one in told.of("section")
    }
    assert sum(path.count("M") for path in re.findall(r'<path d="(M[^"]*h0)"', text)) == 200
    assert [one["alt"] for one in told.of("img") if one.get("alt", "").startswith("Prompt")] == [
        "Prompt: frame", "Prompt: borders of patches", "Prompt: sum",
    ]  # fmt: skip
    assert len([one for one in told.of("img") if one.get("alt", "").endswith("with the prompt")]) == 3
    panels = re.findall('role="img" aria-label="[^"]* over 20', text)
    assert len(told.of("rect", **{"class": "shade"})) == 5 * len(panels) > 0
    assert "run: runs" not in text
    assert "prompts:\n  kind: all" in told.text
    assert "http" not in re.sub(r"data:[^\"]*", "", text).replace("http-equiv", "")


def test_the_confusion_is_that_of_the_accuracy(evaluated):
    found = read_predictions(evaluated)["unlabelled"]
    confusion = confusion_of(found, 5, str)
    accuracy = json.loads((evaluated / "metrics.json").read_text())["unlabelled"]
    shares = {age: parts[0] for age, parts, _ in confusion.aggregated}
    assert shares == {"old": pytest.approx(accuracy["old"]), "new": pytest.approx(accuracy["new"])}
    assert sum(cell.images for cell in confusion.cells) == 1072
    right = sum(cell.images for cell in confusion.cells if cell.row == cell.column)
    assert right / 1072 == pytest.approx(accuracy["all"])
    many = found.__class__("unlabelled", found.uid, np.arange(1072) % 150, np.arange(1072) % 150)
    aggregated = confusion_of(many, 75, str)
    assert aggregated.cells is None
    assert aggregated.aggregated[0][1] == [1.0, 0.0, 0.0]
    assert confusion_of(many.__class__("unlabelled", found.uid, many.target * 0 - 1, many.category), 75, str) is None


def test_curves_take_the_same_memory_however_long_a_run_is():
    steps = Steps()
    for step in range(0, 5_000_000, 997):
        steps.add({"step": step, "phase": "model" if step < 2_500_000 else "prompt", "total": 1.0, "sup_con": None})
    assert steps.sums.shape[-1] == 2 * BINS
    assert (steps.counts[:, 0].sum(), steps.counts[:, 5].sum()) == (len(range(0, 5_000_000, 997)), 0)
    assert {y for _, y in steps.curve("model", "total")} == {1.0}
    (shade,) = [one for one in steps.shades() if one[2] == 1]
    assert shade[0] == pytest.approx(2_500_000, abs=steps.width)
    for odd in (
        {"step": 10**400, "evaluation": {}},
        {"step": 10**30, "phase": "model", "total": True},
        {"step": 1, "phase": {}, "total": "x"},
    ):
        steps.add(odd)


def test_it_keeps_its_size_by_smaller_and_fewer_thumbnails(evaluated, page, tmp_path):
    path, whole = tmp_path / "page.html", page.stat().st_size
    pictures = sum(len(one["data-src"]) for one in page_of(page).of("img") if "data-src" in one)
    sizes = []
    for share in (0.0, 0.15, 0.7):
        limit = round((whole - (1 - share) * pictures) / 1e6, 6)
        assert main(["report", str(evaluated), "--html", str(path), "--max-mb", f"{limit}"]) == 0
        assert path.stat().st_size <= limit * 1e6
        told = page_of(path)
        found = [one["data-src"] for one in told.of("img") if "data-src" in one]
        assert sum(map(len, found)) <= share * pictures
        sizes.append(sum(map(len, found)))
        assert f"below {limit:g} MB" in told.text
    assert sizes[0] == 0 < sizes[1] < sizes[2]


def test_sizes_that_cannot_be_kept_are_one_line(evaluated, tmp_path, capsys):
    for given, told in {
        "0.01": "MB without any gallery: raise --max-mb 0.01",
        "0": "--max-mb 0",
        "1e308": "at most 100000",
        "nan": "nan",
    }.items():
        assert main(["report", str(evaluated), "--html", str(tmp_path / "p.html"), "--max-mb", given]) in (1, 2)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(errors) == 1
        assert told in errors[0]


def test_hostile_names_are_text(untrained, tmp_path):
    pile = tmp_path / "pile"
    for part, label in (("train", HOSTILE.replace("/", "")), ("train", "b"), ("train", "c"), ("train", "d")):
        for number in range(12):
            name = f"{number}\x1b[31m\u202egnp.exe <script>alert(2)<script>\n.png"
            path = pile / part / label / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
            Image.fromarray(pixels).save(path.with_name("x.png"))
            path.with_name("x.png").rename(path)
    data = tmp_path / "data"
    assert make_shards(["imagefolder", str(pile), str(data), "--old", "2", "--name", "<b>&amp;"]) == 0
    run = Path(shutil.copytree(untrained, tmp_path / "<i>run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"root": str(data)}
    config["model"]["num_new"] = 8
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    weights = run / "model.safetensors"
    save_file(load_file(weights), weights, {"facts": '{"step": 1}'})  # as if trained on these classes
    assert main(["eval", str(run)]) == 0
    out = tmp_path / "page.html"
    assert main(["report", str(run), "--html", str(out)]) == 0
    content = out.read_bytes().decode("utf-8")  # is UTF-8, whatever the names were
    told = page_of(out)
    assert len(told.of("script")) == 1
    assert not told.of("b")
    assert not told.of("i")
    assert not [one for _, one in told.elements if any(name.startswith("on") for name in one)]
    assert all(one.get("src", "data:").startswith("data:") for one in told.of("img"))
    assert "alert(1)" in told.text
    titles = [one["title"] for one in told.of("li") if "title" in one]
    assert any("\\x1b[31m\\u202egnp.exe" in title for title in titles)
    assert "\x1b" not in content
    assert "\u202e" not in content
    policy = told.of("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


def test_shards_that_are_gone_are_said_and_the_rest_stays(evaluated, digits, tmp_path, capsys):
    data, run = Path(shutil.copytree(digits, tmp_path / "data")), Path(shutil.copytree(evaluated, tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["root"] = str(data)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "page.html"

    def page_without(told):
        assert main(["report", str(run), "--html", str(out)]) == 0
        assert told in capsys.readouterr().err
        page = page_of(out)
        assert told in page.text
        assert len(page.of("details", **{"class": "category"})) >= 3
        return page

    damaged = next(data.glob("train-unlabelled-*.tar"))
    damaged.write_bytes(bytes(damaged.stat().st_size))
    page = page_without("images cannot be read or do not decode")
    assert len([one for one in page.of("img") if "data-src" in one]) >= 1
    damaged.unlink()
    page = page_without("is missing: make the shards again")
    assert not [one for one in page.of("img") if "data-src" in one]
    assert [one for one in page.of("img") if one.get("alt", "").startswith("Prompt")]
    novelty = {one["id"]: one["data-novelty"] for one in page.of("details", **{"data-age": "new"})}
    assert novelty
    assert "" not in novelty.values()
    assert {one["data-novelty"] for one in page.of("details", **{"data-age": "old"})} <= {""}  # nearest to themselves
    (data / MANIFEST).unlink()
    page_without("manifest.json is missing")


def test_shards_that_were_made_anew_show_no_picture_of_another_image(evaluated, digits, tmp_path, capsys):
    """A uid is a place in a list: with three more files in the pile it is another image's."""
    run, out = Path(shutil.copytree(evaluated, tmp_path / "run")), tmp_path / "page.html"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["dataset"] == read_manifest(digits).digest()

    def pictures() -> int:
        assert main(["report", str(run), "--html", str(out)]) == 0
        page = page_of(out)
        assert len(page.of("details", **{"class": "category"})) >= 3
        assert ("has other shards than" in page.text) == ("has other shards than" in capsys.readouterr().err)
        return len([one for one in page.of("img") if "data-src" in one])

    assert pictures() >= 3
    (run / "metrics.json").write_text(json.dumps(metrics | {"dataset": "0" * 64}))
    assert pictures() == 0
    del metrics["dataset"]  # of an earlier version
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert pictures() >= 3
    arrays = dict(np.load(run / "predictions.npz"))
    fewer = {name: column[:-3] if name.startswith("unlabelled") else column for name, column in arrays.items()}
    np.savez(run / "predictions.npz", **fewer)
    metrics["unlabelled"]["samples"] -= 3
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert pictures() == 0


def test_runs_beside_each_other_and_what_has_no_model(evaluated, digits, tmp_path):
    kmeans = tmp_path / "kmeans"
    assert main(["kmeans", str(digits), str(kmeans)]) == 0
    out = tmp_path / "page.html"
    assert main(["report", str(evaluated), str(kmeans), "--html", str(out)]) == 0
    page = page_of(out)
    assert "k-means on pixels" in page.text
    assert len(page.of("details", **{"class": "category"})) >= 3
    assert main(["report", str(kmeans), "--html", str(out)]) == 0
    assert "None of these runs has a model" in page_of(out).text


def test_mistakes_are_one_line(evaluated, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("kept")
    (tmp_path / "index.html").write_text("<!doctype html><title>of somebody else</title>")
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    cases = [
        (tmp_path / "notes.txt", "is there and no page"),
        (run / "model.safetensors", "is there and no page"),
        (tmp_path / "index.html", "is there and no page"),
        (tmp_path / ("p" * 230 + ".html"), "cannot be written"),
        (tmp_path, "is a folder"),
        ("/dev/null/p.html", "cannot be written"),
    ]

    def told_of(where):
        assert main(["report", str(run), "--html", str(where)]) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        return line

    for where, told in cases:
        assert told in told_of(where)
    assert (tmp_path / "notes.txt").read_text() == "kept"
    good = (run / "predictions.npz").read_bytes()
    arrays = dict(np.load(io.BytesIO(good)))
    for damage, told in (
        ({"unlabelled_prediction": arrays["unlabelled_prediction"] + 90}, "are of class 9"),
        ({"unlabelled_prediction": arrays["unlabelled_prediction"][:9]}, "is damaged"),
        ({"unlabelled_prediction": arrays["unlabelled_prediction"] + 10**12}, "is damaged"),
        ({"unlabelled_uid": arrays["unlabelled_uid"].astype(float)}, "is damaged"),
    ):
        np.savez(run / "predictions.npz", **(arrays | damage))
        assert told in told_of(tmp_path / "p.html")
    (run / "predictions.npz").write_bytes(good[:100])
    assert "is damaged" in told_of(tmp_path / "p.html")
    begin = good.index(b"unlabelled_uid.npy") + 48  # behind the name: inside of what is compressed
    for at in range(begin, begin + 40, 4):
        (run / "predictions.npz").write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        assert "is damaged" in told_of(tmp_path / "p.html")
    (run / "predictions.npz").unlink()
    assert "is not there: `sptnet eval" in told_of(tmp_path / "p.html")
    assert not (tmp_path / "p.html").exists()
