"""A local page onto which one drops a photo to see its parts.

    slotscops app --checkpoint RUN

The page is served on this machine only, unless `--host` says otherwise. It asks nothing of any other address and keeps
no photo. It is one file of ours, served by Starlette and uvicorn. We do not use Gradio, which refuses Pillow 13.
"""

import argparse
import base64
import importlib.util
import io
import socket
import tempfile
import threading
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from slotscops.core import console, pretrained
from slotscops.core.command_line import command_parser
from slotscops.core.errors import RunError, UserError, visible
from slotscops.core.photos import read_photo, shown_name
from slotscops.core.pictures import label_image, picture_bytes, voc_palette
from slotscops.segment.gallery import shrink_labels
from slotscops.segment.names import SHARED, shown_names
from slotscops.segment.segmenter import FoundParts, Segmenter, load

if TYPE_CHECKING:
    from starlette.applications import Starlette

_HOST, _PORT = "127.0.0.1", 8000
_MAX_BYTES = 200_000_000  # of a photo's file
_SHOWN_SIDE = 1280  # pixels of the photo in the page; the label map for download has all of them
_HEADERS = {
    # The browser refuses every address but ours, and the page inside a page of others.
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:;"
    " style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def describe_model(model: Segmenter, title: str) -> dict[str, Any]:
    """What the page shows of the model: its name, its classes, and a warning if its teacher was untrained."""
    weights, note = model.trained.state.teacher_weights, ""
    if pretrained.random_seed(weights) is not None:
        note = f"The teacher of this model was untrained ({weights}), so its parts have no meaning."
    return {"title": title, "classes": model.class_names, "note": note}


def describe_parts(model: Segmenter, parts: FoundParts) -> dict[str, Any]:
    """What the page shows of a photo, for JSON.

    Returns:
        Width and height in pixels, class name or None, `photo` as a JPEG and `shown` as a label map PNG of at most 1280
        pixels a side, `labels` as a label map PNG of the photo's own size (all in base64), and for each slot its name,
        colour and share of the pixels.
    """
    names = shown_names(model.names, model.class_names, model.part_numbers)
    height, width = parts.labels.shape
    photo, jpeg = Image.fromarray(parts.photo), io.BytesIO()
    photo.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    photo.save(jpeg, "JPEG", quality=90)
    slots = zip(
        ["background", *names[SHARED if parts.class_name is None else parts.class_name]],
        voc_palette(256)[parts.numbers].tolist(),
        (parts.areas / parts.labels.size).tolist(),
        strict=True,
    )
    return {
        "width": width,
        "height": height,
        "className": parts.class_name,
        "photo": _base64(jpeg.getvalue()),
        "shown": _base64(picture_bytes(label_image(np.ascontiguousarray(shrink_labels(parts.labels, _SHOWN_SIDE))))),
        "labels": _base64(picture_bytes(label_image(parts.labels))),
        "parts": [{"name": name, "colour": colour, "share": share} for name, colour, share in slots],
    }


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def find_parts(model: Segmenter, content: bytes, class_name: str | None) -> FoundParts:
    """The parts in the content of a photo's file.

    Raises:
        UserError: as `Segmenter.segment`. The message does not name the file.
    """
    with tempfile.NamedTemporaryFile(prefix="slotscops-") as file:
        file.write(content)
        file.flush()
        path = Path(file.name)
        try:
            image = read_photo(path)
        except UserError as error:
            raise UserError(str(error).removeprefix(f"{shown_name(path)}: ")) from None
    return model.segment(image, class_name)


def make_app(model: Segmenter, title: str, hosts: Sequence[str] = (_HOST, "localhost")) -> "Starlette":
    """The web application: the page, `/model` and `/segment`.

    Args:
        title: name of the model in the page.
        hosts: names by which browsers may call this server; `*` allows any. It keeps out pages of others that make a
            browser believe that their name is this machine's.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    page = (resources.files("slotscops.segment") / "app.html").read_text(encoding="utf-8")
    one_at_a_time = threading.Lock()  # two photos at once would take twice the memory

    def answer(content: bytes, class_name: str | None) -> Response:
        try:
            with one_at_a_time:
                described = describe_parts(model, find_parts(model, content, class_name))
        except UserError as error:
            return refuse(str(error), 400)
        except (RunError, MemoryError) as error:
            return refuse(str(error) or "there is no memory for it; make it smaller", 500)
        return JSONResponse(described, headers=_HEADERS)

    def refuse(reason: str, status: int) -> Response:
        return JSONResponse({"error": visible(reason)}, status, headers=_HEADERS)

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page, headers=_HEADERS)

    async def show_model(request: Request) -> Response:
        return JSONResponse(describe_model(model, title), headers=_HEADERS)

    async def segment(request: Request) -> Response:
        if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return refuse("asked for by another page", 403)
        content = bytearray()
        async for piece in request.stream():
            content += piece
            if len(content) > _MAX_BYTES:
                return refuse(f"has more than {_MAX_BYTES:,} bytes", 413)
        return await run_in_threadpool(answer, bytes(content), request.query_params.get("class"))

    routes = [Route("/", show_page), Route("/model", show_model), Route("/segment", segment, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))])


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: give a number from 0 to 65535")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--host {host} --port {port}: {reason}; --port 0 takes a free one") from None


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "app", "Show the parts of photos that are dropped onto a local page.", "--checkpoint runs/toy",
        "Ctrl-C ends it. Photos do not leave this machine, and none is kept.",
    )  # fmt: skip
    parser.add_argument("--checkpoint", required=True, help="a run, one of its checkpoints, or a model's id on the hub")
    parser.add_argument(
        "--teacher-weights", help="weights of the teacher, for a model that was trained on cached features"
    )
    parser.add_argument(
        "--port", type=int, default=_PORT, help=f"port of the page; 0 takes a free one (default: {_PORT})"
    )
    parser.add_argument(
        "--host", default=_HOST,
        help=f"address to listen on; any other than {_HOST} lets others in, without a password (default: {_HOST})",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"app needs {package}; install it with pip install 'slotscops[app]'")
    import uvicorn

    with _listen(options.host, options.port) as listening:
        model = load(options.checkpoint, options.teacher_weights)
        is_local = options.host in (_HOST, "localhost")
        if not is_local:
            console.warn(f"--host {options.host}: whoever reaches this machine can use the page, without a password")
        app = make_app(model, Path(options.checkpoint).name, (_HOST, "localhost") if is_local else ("*",))
        shown = f"[{options.host}]" if ":" in options.host else options.host
        console.say(f"http://{shown}:{listening.getsockname()[1]}/ shows the parts of photos; Ctrl-C ends it")
        settings = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", ws="none", loop="asyncio")
        uvicorn.Server(settings).run(sockets=[listening])
    return 0
