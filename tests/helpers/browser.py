"""A page as a user sees it: in headless Chromium, from disk."""

from pathlib import Path
from typing import Any

import numpy as np


def open_tab(browser: Any, page: Path, width: int = 1200, height: int = 800, **settings: Any) -> Any:
    """Opens the page from disk. Errors of its script go to `errors`, addresses that it requests to `asked`."""
    tab = browser.new_context(viewport={"width": width, "height": height}, **settings).new_page()
    tab.set_default_timeout(20_000)
    tab.errors, tab.asked = [], []
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.on("request", lambda request: tab.asked.append(request.url))
    tab.goto(page.as_uri())
    return tab


def contrast(tab: Any, selector: str) -> float:
    """Ratio of the luminances of an element's text and of its background (WCAG 2.2)."""
    colours = tab.evaluate(
        """selector => {
          let element = document.querySelector(selector);
          const text = getComputedStyle(element).color, clear = 'rgba(0, 0, 0, 0)';
          while (getComputedStyle(element).backgroundColor === clear) element = element.parentElement;
          return [text, getComputedStyle(element).backgroundColor];
        }""",
        selector,
    )
    luminances = []
    for colour in colours:
        channels = np.array([int(part) for part in colour[4:-1].split(",")]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        luminances.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)
