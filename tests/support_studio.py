"""What a person does in the studio's tabs, and what is seen there."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from support_browser import Browser

from diptych.trainers.picture_files import read_metadata


def green_ramp(path: Path) -> Path:
    """A picture of 64 × 48 pixels, in column x the green 3x, written to `path`."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[..., 1] = np.arange(64, dtype=np.uint8) * 3
    Image.fromarray(pixels).save(path)
    return path


def finish(browser: Browser, name: str, folder: Path, count: int) -> str:
    """Press start, wait until `count` more pictures are there and the page says so; the closing line."""
    before = len(read_metadata(folder / "pictures"))
    browser.find(f"{name}-start").click()
    browser.wait(lambda: len(read_metadata(folder / "pictures")) == before + count)
    browser.wait(lambda: f"{count} of {count} pictures in " in browser.text(f"{name}-status"))
    return browser.text(f"{name}-status")


def pictures_in(browser: Browser, identifier: str) -> int:
    return len(browser.driver.find_elements(By.CSS_SELECTOR, f"#{identifier} .thumbnail-lg img, #{identifier} .grid-container img"))


def message(browser: Browser) -> str:
    """The error message on the page, closed after it was read."""
    script = browser.driver.execute_script
    text = browser.wait(lambda: script("return document.querySelector('.toast-body.error')?.innerText.trim()"))
    script("document.querySelectorAll('.toast-body.error .toast-close').forEach(each => each.click())")
    browser.wait(lambda: not browser.driver.find_elements(By.CSS_SELECTOR, ".toast-body.error"))
    return text


def draw(browser: Browser, picture: Path) -> None:
    """Open the tab Inpaint, drop `picture` into its editor and draw a stroke over the middle."""
    browser.tab("Inpaint")
    canvas = browser.wait(lambda: next(iter(browser.driver.find_elements(By.CSS_SELECTOR, "#inpaint-drawn canvas")), None))
    time.sleep(3)  # the editor sets itself up before it takes a picture, and fits the picture in before it takes strokes
    browser.inside("inpaint-drawn", "input[type=file]").send_keys(str(picture))
    time.sleep(3)
    browser.find("inpaint-drawn")
    ActionChains(browser.driver).move_to_element(canvas).click_and_hold().move_by_offset(12, 4).move_by_offset(-20, 6).release().perform()
    time.sleep(1)
