"""The page in a real browser, opened as a file without a network; how long it takes is printed, not asserted."""

import base64
import io
import json
import re
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sptnet_shards.make_shards import main as make_shards

from sptnet.cli import main
from sptnet.data.storage.store import LocalStore
from sptnet.run.folder import PREDICTIONS

pytestmark = pytest.mark.browser
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
SHOWN = "const i = document.querySelector('.gallery img'); return Boolean(i && i.complete && i.naturalWidth)"
LOADED = "return [...document.images].filter((i) => !(i.complete && i.naturalWidth > 0)).length"
IMAGES = 16  # of a category: a gallery's most


def photograph(draws: np.random.Generator) -> bytes:
    """A JPEG of 96 x 96 pixels with large and small shapes, so that it takes what a photograph's thumbnail does."""
    coarse, fine = (Image.fromarray(draws.integers(0, 256, (n, n, 3), np.uint8)).resize((96, 96)) for n in (6, 32))
    written = io.BytesIO()
    Image.blend(coarse, fine, 0.35).save(written, "JPEG", quality=90)
    return written.getvalue()


def discovered(untrained: Path, root: Path, categories: int) -> Path:
    """A run that put 16 photographs into each of many categories."""
    root.mkdir()
    draws = np.random.default_rng(0)
    with tarfile.open(root / "train-0.tar", "w") as tar:
        for number in range(categories * (IMAGES + 2)):
            for suffix, content in (("jpg", photograph(draws)), ("cls", str(number % categories).encode())):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    half = categories // 2
    assert make_shards(["index", str(root), "--old", str(half), "--labelled-fraction", "0.2"]) == 0
    run = Path(shutil.copytree(untrained, root.parent / f"run-{categories}"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["root"] = str(root)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    grow_head(run, categories)
    store = LocalStore(root)
    entries = np.concatenate([store.entries(shard) for shard in store.manifest.of_kind("unlabelled")])
    entries = entries[np.argsort(entries["uid"])]
    uid, target = entries["uid"], entries["target"]
    np.savez(run / PREDICTIONS, unlabelled_uid=uid, unlabelled_target=target, unlabelled_prediction=target)
    result = {"all": 1.0, "old": 1.0, "new": 1.0, "samples": len(uid), "classes_used": categories}
    (run / "metrics.json").write_text(json.dumps({"method": "sptnet", "unlabelled": result}))
    return run


def grow_head(run: Path, classes: int) -> None:
    """Give a run's model a head of so many classes."""
    from sptnet.build import build_model, build_store
    from sptnet.run.folder import read_config
    from sptnet.run.model_file import ModelFacts, save_model

    config = read_config(run)
    model, prompt = build_model(config, build_store(config).manifest)
    assert model.head.num_classes == classes
    save_model(run, model.state_dict(), prompt, ModelFacts(1))


def scroll_through(browser):
    """To the end of the page, as somebody who reads it."""
    at = 0
    while at < browser.execute_script("return document.documentElement.scrollHeight"):
        browser.execute_script(f"window.scrollTo(0, {at})")
        time.sleep(0.02)
        at += 800


@pytest.mark.parametrize("categories", [200, 1000])
def test_it_opens_at_once_and_every_image_loads(browser, untrained, tmp_path, categories, capsys):
    run, path = discovered(untrained, tmp_path / "data", categories), tmp_path / "page.html"
    assert main(["report", str(run), "--html", str(path)]) == 0
    assert path.stat().st_size <= 25e6
    begin = time.monotonic()
    browser.get(path.as_uri())
    while not browser.execute_script(SHOWN):
        time.sleep(0.01)
    took = time.monotonic() - begin
    with capsys.disabled():
        print(f"\n{categories} categories, {path.stat().st_size / 1e6:.1f} MB: first gallery after {took:.2f} s")
    galleries = browser.find_elements(By.CSS_SELECTOR, ".gallery img")
    assert len(galleries) == categories
    waiting = browser.execute_script("return document.querySelectorAll('img[data-src]').length")
    assert waiting > categories / 2  # decoded when scrolled to, and not before
    scroll_through(browser)
    deadline = time.monotonic() + 60
    while browser.execute_script("return document.querySelectorAll('img[data-src]').length + 0") and (
        time.monotonic() < deadline
    ):
        scroll_through(browser)
    time.sleep(0.5)
    assert browser.execute_script(LOADED) == 0
    assert browser.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {path.as_uri()}


@pytest.fixture(scope="module")
def page(untrained, tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    run = Path(shutil.copytree(untrained, root / "run"))
    assert main(["eval", str(run)]) == 0
    assert main(["report", str(run), "--html", str(root / "page.html")]) == 0
    return root / "page.html"


def ids(browser):
    """Categories that are shown, in order."""
    script = "return [...document.querySelectorAll('.category')].filter((c) => !c.hidden).map((c) => c.id)"
    return browser.execute_script(script)


def of(browser, key):
    script = "return [...document.querySelectorAll('.category')].map((c) => Number(c.dataset[arguments[0]]))"
    return browser.execute_script(script, key)


def test_sorting_searching_and_collapsing(browser, page):
    browser.get(page.as_uri())
    sort = browser.find_element(By.ID, "sort")
    orders = {"size": ("size", -1), "unsure": ("confidence", 1), "novel": ("novelty", -1), "mixed": ("purity", 1)}
    for name, (key, sign) in orders.items():
        sort.find_element(By.CSS_SELECTOR, f"option[value={name}]").click()
        found = [sign * value for value in of(browser, key)]
        assert found == sorted(found)
    everything = ids(browser)
    search = browser.find_element(By.ID, "search")
    search.send_keys("new-")
    found = browser.execute_script("return [...document.querySelectorAll('.category')].filter((c) => !c.hidden)")
    assert 0 < len(found) <= len(everything)
    assert all("new-" in one.get_attribute("data-text") for one in found)
    search.send_keys("nothing is called so")
    assert ids(browser) == []
    assert browser.find_element(By.ID, "told").text == f"0 of {len(everything)} categories"
    search.send_keys(Keys.ESCAPE)
    assert ids(browser) == everything
    browser.find_element(By.CSS_SELECTOR, "#age option[value=new]").click()
    assert 0 < len(ids(browser)) < len(everything)
    browser.find_element(By.CSS_SELECTOR, "#age option[value=all]").click()
    for button, expected in (("close", 0), ("open", len(everything))):
        browser.find_element(By.ID, button).click()
        assert browser.execute_script("return document.querySelectorAll('.category[open]').length") == expected
    browser.find_element(By.ID, "fine").click()
    assert not browser.find_elements(By.CSS_SELECTOR, ".category[open][data-fine='1']")
    assert browser.get_log("browser") == []


def test_by_keyboard_alone(browser, page):
    browser.get(page.as_uri())
    keys = browser.find_element(By.TAG_NAME, "body")

    def focused(script="return document.activeElement.id"):
        return browser.execute_script(script)

    keys.send_keys(Keys.TAB)
    assert focused("return document.activeElement.className") == "skip"
    keys.send_keys("/")
    assert focused() == "search"
    browser.switch_to.active_element.send_keys("jk", Keys.ESCAPE)
    browser.find_element(By.TAG_NAME, "body").send_keys("j")
    first = focused("return document.activeElement.closest('.category').id")
    assert first == ids(browser)[0]
    browser.switch_to.active_element.send_keys("j")
    assert focused("return document.activeElement.closest('.category').id") == ids(browser)[1]
    browser.switch_to.active_element.send_keys("k")
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.execute_script("return document.getElementById(arguments[0]).open", first) is False
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert focused(outline) == "solid"
    # a tab stop for every control, none for each dot of the map
    stops = "return document.querySelectorAll('#map a:not([tabindex=\"-1\"])').length"
    assert browser.execute_script(stops) == 0


def test_nothing_that_has_the_focus_lies_under_the_bar(browser, page):
    browser.get(page.as_uri())
    below = """const bar = document.querySelector(".tools").getBoundingClientRect();
        return document.activeElement.getBoundingClientRect().top - (bar.top <= 0 ? bar.bottom : 0)"""
    for key in ["j"] * len(ids(browser)) + ["k"] * len(ids(browser)):
        browser.switch_to.active_element.send_keys(key)
        assert browser.execute_script(below) >= 0
    dot = browser.find_elements(By.CSS_SELECTOR, "#map a[href]")[0]
    wanted = dot.get_dom_attribute("href").partition("#")[2]
    browser.find_element(By.ID, "search").send_keys("nothing is called so")
    click = "arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true}))"
    browser.execute_script(click, dot)
    assert browser.execute_script("return document.activeElement.closest('.category').id") == wanted
    assert browser.find_element(By.ID, "told").text.startswith("1 of ")
    assert browser.execute_script(below) >= 0
    assert browser.current_url.endswith(f"#{wanted}")


def test_what_was_chosen_holds_when_somebody_comes_back(browser, page):
    browser.get(page.as_uri())
    everything = ids(browser)
    browser.find_element(By.CSS_SELECTOR, "#age option[value=new]").click()
    chosen = ids(browser)
    assert chosen != everything
    browser.get("about:blank")
    browser.back()
    age = browser.execute_script("return document.getElementById('age').value")
    assert ids(browser) == (everything if age == "all" else chosen)


def test_a_name_is_found_however_its_accents_are_written(browser, page, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page.read_text().replace('data-text="', 'data-text="cafe\u0301 '), encoding="utf-8")
    browser.get(path.as_uri())
    browser.find_element(By.ID, "search").send_keys("caf\u00e9")
    assert len(ids(browser)) > 0


def test_a_page_is_printed_with_all_its_pictures(browser, page):
    browser.get(page.as_uri())
    browser.find_element(By.ID, "close").click()
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    galleries = browser.find_elements(By.CSS_SELECTOR, ".gallery img")
    assert len(re.findall(rb"/Subtype ?/Image", printed)) >= len(galleries) > 0
    assert browser.execute_script("return document.querySelectorAll('img[data-src]').length") == 0
    assert browser.execute_script("return document.querySelectorAll('.category:not([open])').length") == 0


def shade(browser, element):
    """How bright the background of an element is, of 255."""
    told = browser.execute_script(f"return getComputedStyle(document.querySelector('{element}')).backgroundColor")
    return np.mean([int(part) for part in told[told.index("(") + 1 : -1].split(",")[:3]])


def test_narrow_windows_light_and_dark(browser, page):
    browser.get(page.as_uri())
    for scheme, bright in (("light", True), ("dark", False)):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert (shade(browser, "body") > 128) == bright
        ink = browser.execute_script("return getComputedStyle(document.body).color")
        assert (np.mean([int(part) for part in ink[ink.index("(") + 1 : -1].split(",")[:3]]) < 128) == bright
        for width in (320, 768, 1600):
            metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            over = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert browser.execute_script(over) <= 0
            widest = "return Math.max(...[...document.querySelectorAll('.gallery')].map((g) => g.clientWidth))"
            assert 0 < browser.execute_script(widest) <= width
    assert browser.get_log("browser") == []


def test_a_page_that_wants_to_run_something_cannot(browser, page, tmp_path):
    """The policy of the page stops what escaping would have let through."""
    path = tmp_path / "page.html"
    planted = "<script>document.title = 'harmed'</script><img src=x onerror=\"document.title = 'harmed'\">"
    path.write_text(page.read_text().replace("<main>", f"<main>{planted}"))
    browser.get(path.as_uri())
    time.sleep(0.3)
    assert browser.title != "harmed"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))
