import base64
import io
import json
import shutil
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
import uvicorn
from commands import TIMEOUT_S, started
from PIL import Image
from small_runs import photo

import slotscops
from slotscops.core.errors import UserError
from slotscops.core.pictures import voc_palette
from slotscops.segment import app
from slotscops.segment.names import SHARED, PartNames, write_names

NAMES = ["head", None, "<b>tail", None, "legs"]


@pytest.fixture(scope="module")
def run(varied_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose parts have names, of another folder than the shared one."""
    folder = shutil.copytree(varied_run, tmp_path_factory.mktemp("named") / "cows")
    write_names(slotscops.load(folder).trained.path, PartNames({SHARED: NAMES}, 1.0, 1))
    return folder


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    """Address of the page, served by a real process."""
    with started([sys.executable, "-m", "slotscops", "app", "--checkpoint", str(run), "--port", "0"]) as running:
        ends = time.monotonic() + TIMEOUT_S
        while "Ctrl-C" not in running.said(running.out):
            assert running.process.poll() is None, running.said(running.err)
            assert time.monotonic() < ends
            time.sleep(0.05)
        yield running.said(running.out).split()[0]


def png(size: tuple[int, int] = (90, 60)) -> bytes:
    content = io.BytesIO()
    photo(size).save(content, "PNG")
    return content.getvalue()


def asked(address: str, content: bytes | None = None, **headers: str) -> Any:
    request = urllib.request.Request(address, content, {name.replace("_", "-"): v for name, v in headers.items()})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return json.load(answer)


def opened(browser: Any, address: str) -> Any:
    tab = browser.new_context(viewport={"width": 1200, "height": 800}).new_page()
    tab.set_default_timeout(20_000)
    tab.errors, tab.asked = [], []
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.on("console", lambda line: tab.errors.append(line.text) if line.type == "error" else None)
    tab.on("request", lambda request: tab.asked.append(request.url))
    tab.goto(address)
    return tab


def test_a_dropped_photo_shows_its_parts_and_their_names(browser: Any, address: str, run: Path, tmp_path: Path) -> None:
    tab = opened(browser, address)
    tab.evaluate(
        """content => {
          const data = new DataTransfer();
          data.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], "cow.png"));
          document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        base64.b64encode(png()).decode(),
    )
    tab.wait_for_selector("#result:not([hidden])")
    labels = slotscops.load(run).segment(photo((90, 60))).labels
    pixels = tab.evaluate("[...byId('parts').getContext('2d').getImageData(0, 0, 90, 60).data]")
    painted = np.array(pixels, np.uint8).reshape(60, 90, 4)
    assert (painted[..., :3] == voc_palette()[labels]).all()
    assert (painted[..., 3] == np.where(labels == 0, 0, 255)).all()
    names = ["background", "head", "part 2", "<b>tail", "part 4", "legs"]
    assert tab.locator("#legend span").all_inner_texts() == names
    shares = [float(text.split()[0]) for text in tab.locator("#legend small").all_inner_texts()]
    assert shares == pytest.approx([100 * (labels == slot).mean() for slot in range(6)], abs=0.051)
    assert "90 × 60" in tab.locator("#status").inner_text()

    with tab.expect_download() as download:
        tab.get_by_text("Download the label map").click()
    assert download.value.suggested_filename == "cow.parts.png"
    download.value.save_as(tmp_path / "cow.parts.png")
    with Image.open(tmp_path / "cow.parts.png") as saved:
        assert saved.mode == "P"
        assert (np.asarray(saved) == labels).all()

    tab.locator("#opacity").fill("20")
    assert tab.evaluate("getComputedStyle(byId('parts')).opacity") == "0.2"
    box = tab.locator("#parts").bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 45.5 / 90, box["y"] + box["height"] * 30.5 / 60)
    assert tab.locator("#legend .here span").inner_text() == names[labels[30, 45]]
    assert tab.errors == []
    assert all(url.startswith((address, "data:", "blob:")) for url in tab.asked)


def test_parts_of_a_pruned_model_keep_their_names_and_colours_on_the_page(browser: Any, published: Path) -> None:
    model = slotscops.load(published)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        settings = uvicorn.Config(app.make_app(model, "pruned"), log_level="warning", lifespan="off", ws="none")
        server = uvicorn.Server(settings)
        thread = Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            tab = opened(browser, f"http://127.0.0.1:{listening.getsockname()[1]}/")
            tab.locator("#file").set_input_files({"name": "cow.png", "mimeType": "image/png", "buffer": png()})
            tab.wait_for_selector("#result:not([hidden])")
            names = tab.locator("#legend span").all_inner_texts()
            swatches = tab.evaluate(
                "[...document.querySelectorAll('#legend .swatch')]"
                ".map(swatch => getComputedStyle(swatch).backgroundColor.match(/[0-9]+/g).map(Number))"
            )
            shares = [float(text.split()[0]) for text in tab.locator("#legend small").all_inner_texts()]
            pixels = tab.evaluate("[...byId('parts').getContext('2d').getImageData(0, 0, 90, 60).data]")
            labels = model.segment(photo((90, 60))).labels
            y, x = np.argwhere(labels == 4)[0]
            box = tab.locator("#parts").bounding_box()
            tab.mouse.move(box["x"] + box["width"] * (x + 0.5) / 90, box["y"] + box["height"] * (y + 0.5) / 60)
            pointed_at = tab.locator("#legend .here span").all_inner_texts()
            assert tab.errors == []
            tab.context.close()
        finally:
            server.should_exit = True
            thread.join(TIMEOUT_S)
    numbers = [0, 1, 2, 4, 5]
    assert names == ["background", "head", "leg", "tail", "part 5"]
    assert swatches == voc_palette()[numbers].tolist()
    assert shares == pytest.approx([100 * (labels == number).mean() for number in numbers], abs=0.051)
    painted = np.array(pixels, np.uint8).reshape(60, 90, 4)
    assert (painted[..., :3] == voc_palette()[labels]).all()
    assert pointed_at == ["tail"]


def test_the_page_tells_what_is_wrong_with_a_file_and_that_a_teacher_was_untrained(browser: Any, address: str) -> None:
    tab = opened(browser, address)
    tab.wait_for_selector("#note:not([hidden])")
    assert "untrained (random:0)" in tab.locator("#note").inner_text()
    tab.locator("#file").set_input_files({"name": "cow.jpg", "mimeType": "image/jpeg", "buffer": b"no photo"})
    tab.wait_for_selector("#status.bad")
    assert tab.locator("#status").inner_text().startswith("cow.jpg: is no readable image")
    assert tab.locator("#result").is_hidden()


def test_pages_of_others_get_no_answer(address: str) -> None:
    assert asked(f"{address}segment", png())["width"] == 90
    with pytest.raises(HTTPError, match="400"):
        asked(f"{address}model", Host="evil.example")
    with pytest.raises(HTTPError, match="403"):
        asked(f"{address}segment", png(), Sec_Fetch_Site="cross-site")


def test_an_unknown_class_is_told(address: str) -> None:
    with pytest.raises(HTTPError, match="400") as refused:
        asked(f"{address}segment?class=cow", png())
    assert "its classes share their parts" in json.load(refused.value)["error"]


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: Address already in use.*--port 0"):
            app.main(["--checkpoint", "nowhere", "--port", str(port)])


def test_without_its_packages_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs starlette; install it with pip install 'slotscops\[app\]'"):
        app.main(["--checkpoint", "nowhere"])
