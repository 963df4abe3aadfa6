"""Headless Chromium for tests of pages: its own profile, no request beyond loopback, the console's errors at hand."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
_PATIENCE_SECONDS = 90


class Browser:
    """One window."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    def find(self, identifier: str) -> Any:
        """The element of that id, once it is there and shown."""
        found = self.wait(lambda: next((e for e in self.driver.find_elements(By.ID, identifier) if e.is_displayed()), None))
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        return found

    def inside(self, identifier: str, selector: str) -> Any:
        """The first element inside another, shown or not (a file's input is hidden)."""
        return self.wait(lambda: next(iter(self.driver.find_elements(By.CSS_SELECTOR, f"#{identifier} {selector}")), None))

    def wait(self, found: Callable[[], Any]) -> Any:
        """Poll until `found` gives something."""
        return WebDriverWait(self.driver, _PATIENCE_SECONDS, 0.1).until(lambda _: found())

    def tab(self, name: str) -> None:
        """Open a tab of the page."""
        tabs = "button[role=tab]"
        self.wait(
            lambda: next((e for e in self.driver.find_elements(By.CSS_SELECTOR, tabs) if e.text == name and e.is_displayed()), None)
        ).click()

    def type(self, identifier: str, text: str, selector: str = "textarea") -> None:
        """Type into a field, in place of what stands in it."""
        self.find(identifier)
        field = self.inside(identifier, selector)
        field.clear()
        field.send_keys(text)

    def slider(self, label: str) -> Any:
        """The number box of the slider whose label begins so, on the tab that is shown."""
        boxes = f'input[type=number][aria-label^="number input for {label}"]'
        return self.wait(lambda: next((e for e in self.driver.find_elements(By.CSS_SELECTOR, boxes) if e.is_displayed()), None))

    def slide(self, label: str, value: str) -> None:
        """Type a value into that box."""
        box = self.slider(label)
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(value, Keys.TAB)

    def upload(self, identifier: str, file: Path) -> None:
        """Choose a file in a field for pictures, and wait until it is shown."""
        self.inside(identifier, "input[type=file]").send_keys(str(file))
        self.wait(lambda: self.driver.find_elements(By.CSS_SELECTOR, f"#{identifier} img"))

    def text(self, identifier: str) -> str:
        return self.driver.execute_script("return document.getElementById(arguments[0])?.innerText ?? ''", identifier)

    def value(self, identifier: str, selector: str = "textarea") -> str:
        return self.inside(identifier, selector).get_attribute("value")

    def errors(self) -> list[str]:
        """What the console holds at level `SEVERE` since the last call."""
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]

    def screenshot(self, name: str) -> None:
        """Keep a picture of the window in the folder that `DIPTYCH_SCREENSHOTS` names; in CI by default in `build/screenshots`."""
        folder = os.environ.get("DIPTYCH_SCREENSHOTS") or ("CI" in os.environ and Path(__file__).parents[1] / "build" / "screenshots")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            time.sleep(0.5)  # what slides in has arrived
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def emulate(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """A screen of that size in CSS pixels, in light or dark."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone},
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@contextmanager
def chromium(width: int = 1280, height: int = 1200) -> Iterator[Browser]:
    """A browser of one's own."""
    options = webdriver.ChromeOptions()
    options.binary_location = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver") or "chromedriver"))
        try:
            yield Browser(driver)
        finally:
            driver.quit()
