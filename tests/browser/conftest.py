"""A real Chromium without a network; tests skip where there is none."""

import shutil
from collections.abc import Iterator

import pytest

BINARY, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture
def browser() -> Iterator:
    """A headless Chromium, offline from its first page on, whose console is kept."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if BINARY is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed: `make test-browser` does it on Debian")
    options = webdriver.ChromeOptions()
    options.binary_location = BINARY
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.chrome.service.Service(DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.set_network_conditions(offline=True, latency=0, throughput=0)
        yield driver
    finally:
        driver.quit()
