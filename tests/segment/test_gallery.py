import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import contrast, open_tab
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from slotscops.segment.gallery import GRID_SIDE, Entry, Gallery, Skipped, encode_runs, shrink_labels, write_pictures

PARTS = ["head", "legs", "tail"]
NAMES = ["horse", "100 % #odd?name", 'a "quoted" <b>']
MANY = 5000
SIZES = st.tuples(st.integers(1, 60), st.integers(1, 60))


def decode_runs(runs: str) -> list[int]:
    """Decodes runs as the page does."""
    packed, labels, at = base64.b64decode(runs), [], 0
    while at < len(packed):
        label, length, shift = packed[at], 0, 0
        while True:
            at += 1
            length |= (packed[at] & 127) << shift
            shift += 7
            if packed[at] < 128:
                break
        at += 1
        labels += [label] * length
    return labels


@given(arrays.arrays(np.uint8, SIZES, elements=st.integers(0, 3)))
def test_runs_read_back_are_the_labels(labels: np.ndarray) -> None:
    assert decode_runs(encode_runs(labels)) == labels.reshape(-1).tolist()


def test_a_run_longer_than_two_bytes_can_say_is_whole() -> None:
    assert decode_runs(encode_runs(np.full((200, 200), 254, np.uint8))) == [254] * 40000


@given(st.integers(1, 900), st.integers(1, 900))
def test_small_label_maps_have_the_shape_of_the_photo_and_its_labels(height: int, width: int) -> None:
    labels = np.zeros((height, width), np.uint8)
    labels[: height // 2] = 1
    small = shrink_labels(labels)
    assert max(small.shape) == min(GRID_SIDE, max(height, width))
    assert abs(small.mean() - labels.mean()) <= 1 / len(small)


def build(out: Path, number: int = 3) -> Path:
    """A gallery; part 1 is the left third of every photo, part 2 the right third of the first. Beyond three, the
    photos have no pictures."""
    gallery = Gallery.begin(out, "horse", PARTS, has_maps=False)
    rng = np.random.default_rng(0)
    for name in NAMES:
        photo = rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)
        labels = np.zeros((60, 90), np.uint8)
        labels[:, :30] = 1
        labels[:, 60:] = 2 if name == "horse" else 0
        gallery.add(write_pictures(out, name, photo, labels, 4))
    runs = encode_runs(np.ones((2, 3), np.uint8))
    for place in range(3, number):
        gallery.add(Entry(f"photo-{place}", 90, 60, [0, 1000, 0, 0], (3, 2), runs))
    return gallery.finish([Skipped("bad.jpg", "bad.jpg: is no readable image")])


def test_pictures_of_a_huge_photo_are_small_and_those_of_a_small_one_as_they_are(tmp_path: Path) -> None:
    Gallery.begin(tmp_path, "", PARTS, has_maps=False)
    for name, side, expected in (("huge", 2000, (1280, 320)), ("small", 50, (50, 50))):
        labels = np.ones((side // 2, side), np.uint8)
        entry = write_pictures(tmp_path, name, np.zeros((side // 2, side, 3), np.uint8), labels, 4)
        assert (entry.width, entry.height, entry.shares) == (side, side // 2, [0, 1000, 0, 0])
        for folder, width in zip(("photos", "thumbnails"), expected, strict=True):
            with Image.open(tmp_path / "gallery" / folder / f"{name}.jpg") as picture:
                assert picture.size == (width, width // 2)


def test_the_page_holds_no_data_and_label_maps_come_a_hundred_at_a_time(tmp_path: Path) -> None:
    page = build(tmp_path / "short")
    assert page.read_bytes() == build(tmp_path / "long", 250).read_bytes()
    scripts = sorted((tmp_path / "long" / "gallery").glob("labels-*.js"))
    assert [path.name for path in scripts] == ["labels-0000.js", "labels-0001.js", "labels-0002.js"]
    texts = [path.read_text().removesuffix(");\n") for path in scripts]
    pages = [json.loads(text.partition(",")[2]) for text in texts]
    assert [len(page) for page in pages] == [100, 100, 50]


def test_a_gallery_that_is_begun_again_has_no_page_until_it_is_whole(tmp_path: Path) -> None:
    page = build(tmp_path)
    Gallery.begin(tmp_path, "horse", PARTS, has_maps=False)
    assert not page.exists()


# ---- in a real browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("gallery"), MANY)


def opened(browser: Any, page: Path, width: int = 1200, height: int = 800, **settings: Any) -> Any:
    """The page with its first photo painted."""
    tab = open_tab(browser, page, width, height, **settings)
    tab.wait_for_selector(".card canvas")
    tab.wait_for_function("document.querySelector('.card canvas').width < 300")  # 300 until it is painted
    return tab


def hover(tab: Any, selector: str, across: float) -> str:
    """Name shown when the pointer is over a picture's middle row, `across` of its width."""
    box = tab.locator(selector).first.bounding_box()
    tab.mouse.move(box["x"] + across * box["width"], box["y"] + box["height"] / 2)
    return str(tab.locator("#tip span").inner_text())


def test_the_pointer_names_the_part_on_the_photo_and_on_its_parts(browser: Any, small: Path) -> None:
    tab = opened(browser, small)
    for pane in (".pane:nth-child(1) .picture", ".pane:nth-child(2) .picture"):
        assert [hover(tab, f".card {pane}", across) for across in (0.1, 0.5, 0.9)] == ["head", "background", "legs"]
    tab.locator(".card").first.click()
    assert hover(tab, "#viewer-panes .pane:nth-child(1) .picture", 0.9) == "legs"
    assert tab.errors == []
    assert all(url.startswith(("file:", "data:")) for url in tab.asked)


def test_photos_of_any_name_show_their_pictures(browser: Any, small: Path) -> None:
    tab = opened(browser, small)
    assert tab.locator(".card .name").all_inner_texts() == NAMES
    tab.wait_for_function("[...document.images].every(image => image.complete)")
    assert tab.evaluate("[...document.images].map(image => image.naturalWidth)") == [90] * 6
    assert "1 photo could not be read" in tab.locator("#skipped").inner_text()


def test_filter_search_and_order_choose_the_photos(browser: Any, small: Path) -> None:
    tab = opened(browser, small)
    names = tab.locator(".card .name")
    tab.get_by_role("button", name="legs 1").click()
    assert names.all_inner_texts() == ["horse"]
    tab.get_by_role("button", name="tail 0").click()
    assert tab.locator("#empty").is_visible()
    tab.get_by_role("button", name="tail 0").click()
    tab.get_by_role("button", name="legs 1").click()
    tab.locator("#search").fill("ODD")
    assert names.all_inner_texts() == [NAMES[1]]
    tab.locator("#search").fill("")
    tab.locator("#sort").select_option("most background")
    assert names.all_inner_texts() == [NAMES[1], NAMES[2], "horse"]
    assert tab.errors == []


def test_the_slider_sets_the_opacity_of_all_parts(browser: Any, small: Path) -> None:
    tab = opened(browser, small)
    tab.locator("header .opacity").fill("25")
    shown = tab.evaluate("[...document.querySelectorAll('canvas')].map(canvas => getComputedStyle(canvas).opacity)")
    assert shown == ["0.25"] * 3


def test_everything_is_reached_from_the_keyboard(browser: Any, small: Path) -> None:
    tab = opened(browser, small)
    for _ in range(6 + 1):  # search, order, opacity, three parts, list of what was not read
        tab.keyboard.press("Tab")
    tab.keyboard.press("Tab")
    focused = "document.activeElement.getAttribute('aria-label')"
    assert tab.evaluate(focused) == "horse: head, legs"
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    assert tab.locator("#viewer-name").inner_text() == NAMES[1]
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#viewer-place").inner_text() == "3 of 3"
    tab.keyboard.press("Escape")
    tab.locator("#viewer").wait_for(state="hidden")
    # Chromium says that a dialog was closed a moment after it is gone.
    tab.wait_for_function(f"{focused} === {json.dumps(f'{NAMES[2]}: head')}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_in_light_and_dark(browser: Any, small: Path, scheme: str) -> None:
    tab = opened(browser, small, 390, 844, color_scheme=scheme, is_mobile=True, has_touch=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    for selector in ("body", "#count", ".card .name", ".chip small"):
        assert contrast(tab, selector) >= 4.5, selector  # WCAG 2.2, 1.4.3
    tab.locator(".card").first.tap()
    assert tab.locator("#viewer").bounding_box()["width"] == 390


def test_of_thousands_of_photos_only_those_on_the_screen_exist(browser: Any, large: Path) -> None:
    tab = opened(browser, large)
    assert tab.locator("#count").inner_text() == "5,000 photos"
    loaded = [url for url in tab.asked if "labels-" in url]
    assert len(loaded) == 1
    tab.locator(".card").first.focus()
    tab.keyboard.press("End")
    last = tab.locator(".card").last
    assert last.locator(".name").inner_text() == f"photo-{MANY - 1}"
    assert tab.locator(".card").count() < 60
    assert hover(tab, f'.card[aria-label^="photo-{MANY - 1}:"] .picture', 0.5) == "head"
    assert len([url for url in tab.asked if "labels-" in url]) <= 3
    assert tab.errors == []
