"""Finds the parts in clips: one label map for each frame, and a clip with the parts painted.

    DIR/videos/NAME/overlay.mp4        H.264, the clip's size, frames and times, without its sound
    DIR/videos/NAME/parts/000000.png   label map of the first frame, as `NAME.parts.png` of a photo

The folder of a clip appears when all its frames are written, or not at all. Frames are read, segmented and written a
few at a time, so that memory does not grow with the length of the clip.

Shapes: S slots, H x W pixels of a frame, upright.
"""

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slotscops.core import console
from slotscops.core.batching import batches_by_pixels
from slotscops.core.errors import UserError, first_line
from slotscops.core.files import fsync, remove_abandoned, writer_name
from slotscops.core.photos import shown_name, unique_names
from slotscops.core.pictures import label_image, overlay, picture_bytes
from slotscops.segment.gallery import Skipped
from slotscops.segment.segmenter import FoundParts, Segmenter

if TYPE_CHECKING:
    import av

CLIP_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".3gp", ".wmv"})
FOLDER = "videos"  # among the results
# FFmpeg's names of the file formats. Others, such as playlists, could make it open further files and addresses.
_FORMATS = "mov,matroska,avi,mpegts,mpeg,asf"
_MAX_PIXELS = 40_000_000  # of a frame, a little more than 8K
_SHORT_S, _SHORT_SHARE = 0.5, 0.05  # a clip that ends earlier than this before its promised end is truncated
# Of x264. At 18 the loss is hardly visible. Without B-frames, MP4 keeps the duration of every frame, the last included.
_ENCODING = {"crf": "18", "preset": "veryfast", "bf": "0"}


class ClipError(UserError):
    """A clip that cannot be read to its end. The message names it."""


def is_clip(path: Path) -> bool:
    """Whether the path is a file whose ending is that of a clip."""
    return path.suffix.lower() in CLIP_SUFFIXES and path.is_file()


def check_can_segment(share: float) -> None:
    """Checks a share of earlier frames, and that clips can be read and written.

    Raises:
        UserError: if the share is not in [0, 1), or PyAV is not installed or was built without x264.
    """
    if not 0 <= share < 1:
        raise UserError(f"--smooth {share}: give a share of at least 0 and below 1")
    if importlib.util.find_spec("av") is None:
        raise UserError("clips need PyAV; install it with pip install 'slotscops[video]'")
    import av

    if "libx264" not in av.codecs_available:
        raise UserError(
            "this PyAV cannot write H.264 (libx264); install its wheel with pip install --force-reinstall av"
        )


# ---- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """One frame of a clip."""

    photo: NDArray[np.uint8]  # (H, W, 3) RGB, upright
    pts: int  # when it is shown, in units of the clip's time base
    duration: int  # in the same units


class Clip:
    """An open clip. Made by `open_clip`."""

    def __init__(self, container: "av.container.InputContainer", shown: str) -> None:
        """
        Args:
            shown: the clip's name for messages.
        """
        import av

        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream) or stream.codec_context is None:  # None for an unknown codec
            raise ClipError(f"{shown}: is no clip with a video that can be decoded")
        self._container, self._stream, self._shown = container, stream, shown
        stream.thread_type = "AUTO"
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > _MAX_PIXELS:
            raise ClipError(f"{shown}: {width} x {height} pixels, at most {_MAX_PIXELS} are read")
        self._size = width, height
        self.rate = stream.average_rate or stream.guessed_rate or Fraction(25)  # frames per second
        self.time_base = stream.time_base or 1 / self.rate  # seconds
        self.pixel_shape = stream.sample_aspect_ratio or Fraction(1)  # width of a pixel over its height

    def num_frames(self) -> int:
        """The number of frames that the file promises, for the progress bar."""
        seconds = (self._container.duration or 0) / 1_000_000
        return int(self._stream.frames or round(seconds * self.rate))

    def frames(self) -> Iterator[Frame]:
        """Yields the frames in the order in which they are shown.

        Raises:
            ClipError: if the clip is damaged, or ends before the end that it promises.
        """
        import av

        count, shown_last, ended = 0, None, 0.0
        usual = self._usual_duration()
        try:
            for packet in self._container.demux():
                if packet.pts is not None:
                    ended = max(ended, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index != self._stream.index:
                    continue
                if packet.is_corrupt:
                    raise self._damage(count, "its data end too early")
                for frame in self._stream.decode(packet):
                    shown_last = self._time_after(shown_last, frame.pts)
                    yield Frame(self._pixels(frame), shown_last, frame.duration or usual)
                    count += 1
        except av.FFmpegError as error:
            raise self._damage(count, first_line(error)[:200]) from None
        promised = (self._container.duration or 0) / 1_000_000
        lasted = ended - (self._container.start_time or 0) / 1_000_000
        if promised - lasted > max(_SHORT_S, _SHORT_SHARE * promised):
            raise self._damage(count, f"it promises {promised:.1f} s and ends after {lasted:.1f} s")
        if count == 0:
            raise ClipError(f"{self._shown}: is without any frame that can be read")

    def _usual_duration(self) -> int:
        return max(1, round(1 / self.rate / self.time_base))

    def _damage(self, count: int, reason: str) -> ClipError:
        return ClipError(f"{self._shown}: is truncated or damaged after {count} frames ({reason})")

    def _time_after(self, last: int | None, pts: int | None) -> int:
        """The time of a frame: its own, or one frame after the last if it has none or it does not lie after it."""
        if last is None:
            return pts or 0
        return pts if pts is not None and pts > last else last + self._usual_duration()

    def _pixels(self, frame: "av.VideoFrame") -> NDArray[np.uint8]:
        """(H, W, 3) RGB of a frame, turned as the clip says. All frames get the size that the clip begins with."""
        width, height = self._size
        pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
        # The rotation is counterclockwise, as NumPy's.
        return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


@contextmanager
def open_clip(path: Path) -> Iterator[Clip]:
    """Opens a clip.

    Raises:
        ClipError: if the file cannot be read, is no clip, or has more than 40 million pixels a frame.
    """
    import av

    shown = shown_name(path)
    options = {"format_whitelist": _FORMATS}
    try:
        file = path.open("rb")
    except OSError as error:
        raise ClipError(f"{shown}: cannot be read ({error.strerror})") from None
    with file:
        try:
            container = av.open(file, "r", options=options)
        except (av.FFmpegError, ValueError) as error:
            raise ClipError(f"{shown}: is no readable clip ({first_line(error)[:200]})") from None
        with container:
            yield Clip(container, shown)


# ---- smoothing ----------------------------------------------------------------------------------------------------


class Smoother:
    """An exponential mean of soft maps over time.

        m_1 = p_1,  m_t = a m_(t-1) + (1 - a) p_t

    p_t are the soft maps of frame t, and a is the share of the earlier frames. The mean is over frames, not over
    seconds.
    """

    def __init__(self, share: float) -> None:
        """
        Args:
            share: a, of at least 0 and below 1. 0 smooths nothing.
        """
        self.share = share
        self._mean: NDArray[np.float32] | None = None  # (S, H, W)

    def labels(self, parts: FoundParts) -> NDArray[np.uint8]:
        """(H, W) uint8 slot with the largest smoothed share of each pixel, for the next frame."""
        if self.share == 0:
            return parts.labels
        size = parts.photo.shape[:2]
        mean, share = self._mean, self.share
        if mean is None:
            mean, share = np.zeros((len(parts.logits), *size), np.float32), 0.0
            self._mean = mean
        labels = np.empty(size, np.uint8)
        first = 0
        for strip in parts.strips():
            rows = slice(first, first + strip.shape[1])
            mean[:, rows] *= share
            mean[:, rows] += (1 - share) * strip
            labels[rows] = parts.numbers[mean[:, rows].argmax(axis=0)]
            first = rows.stop
        return labels


# ---- writing ------------------------------------------------------------------------------------------------------


class _Writer:
    """Writes the label maps and the overlays of one clip. Made by `_open_writer`."""

    def __init__(self, folder: Path, clip: Clip, container: "av.container.OutputContainer") -> None:
        self._folder, self._clip, self._container = folder, clip, container
        self._stream: Any = None
        self.count = 0  # frames so far

    def add(self, frame: Frame, labels: NDArray[np.uint8]) -> None:
        """Adds the next frame with its (H, W) label map."""
        import av

        (self._folder / "parts" / f"{self.count:06}.png").write_bytes(picture_bytes(label_image(labels)))
        painted = av.VideoFrame.from_ndarray(np.asarray(overlay(frame.photo, labels)), "rgb24")
        if self._stream is None:
            self._stream = self._begin(painted.width, painted.height)
        coded = painted.reformat(format=self._stream.pix_fmt, dst_colorspace="ITU709")
        coded.pts, coded.time_base, coded.duration = frame.pts, self._clip.time_base, frame.duration
        self._container.mux(self._stream.encode(coded))
        self.count += 1

    def finish(self) -> None:
        """Writes the frames that the encoder still holds."""
        self._container.mux(self._stream.encode(None))

    def _begin(self, width: int, height: int) -> Any:
        from av.codec.context import Flags

        stream: Any = self._container.add_stream("libx264", rate=self._clip.rate, options=_ENCODING)
        stream.width, stream.height = width, height
        # With colours at half the resolution, which every player takes, H.264 has even sides only.
        stream.pix_fmt = "yuv420p" if width % 2 == 0 and height % 2 == 0 else "yuv444p"
        context = stream.codec_context
        context.time_base = self._clip.time_base
        context.flags |= Flags.frame_duration.value  # otherwise the last frame lasts 1 / rate
        context.sample_aspect_ratio = self._clip.pixel_shape
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        return stream


@contextmanager
def _open_writer(folder: Path, clip: Clip) -> Iterator[_Writer]:
    """Writes into a folder that gets its name when the body ends without an error. An earlier one is replaced."""
    import av

    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".clip.{writer_name()}.", suffix=".partial", dir=folder.parent))
    try:
        partial.chmod(folder.parent.stat().st_mode)  # mkdtemp closes the folder to others
        (partial / "new" / "parts").mkdir(parents=True)
        with (
            (partial / "new" / "overlay.mp4").open("wb") as file,
            av.open(file, "w", format="mp4") as container,
        ):
            writer = _Writer(partial / "new", clip, container)
            yield writer
            writer.finish()
        fsync(partial / "new" / "overlay.mp4")
        if folder.exists():
            folder.rename(partial / "old")
        (partial / "new").rename(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(partial)


def segment_clip(
    model: Segmenter, path: Path, folder: Path, smooth: float, batch_size: int = 8, class_name: str | None = None
) -> int:
    """Segments a clip and writes the folder of its results.

    Args:
        folder: gets the results when all of them are written.
        smooth: share of the earlier frames in the soft maps of each, see `Smoother`.
        batch_size: frames that the model sees at once; fewer if they are large.
        class_name: class of the object, see `Segmenter.segment`. If not given, the one guessed for the first frame is
            that of the whole clip, because the parts of another class would have other meanings.

    Returns:
        The number of frames.

    Raises:
        ClipError: if the clip cannot be read to its end. Nothing is left of it then.
    """
    smoother = Smoother(smooth)
    with open_clip(path) as clip, _open_writer(folder, clip) as writer:
        frames = iter(console.track(clip.frames(), clip.num_frames(), "frames"))
        for batch in _batches(frames, batch_size):
            for frame, parts in zip(batch, _find_parts(model, batch, class_name), strict=True):
                class_name = parts.class_name
                writer.add(frame, smoother.labels(parts))
        return writer.count


def _batches(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    """Yields the first frame alone, and then `size` frames at a time, or fewer if they are large."""
    yield from ([frame] for frame in islice(frames, 1))
    yield from batches_by_pixels(frames, lambda frame: frame.photo.shape[0] * frame.photo.shape[1], size)


def _find_parts(model: Segmenter, batch: Sequence[Frame], class_name: str | None) -> list[FoundParts]:
    return model.segment_batch([Image.fromarray(frame.photo) for frame in batch], class_name)


def segment_clips(
    model: Segmenter,
    clips: Sequence[Path],
    out: Path,
    smooth: float,
    batch_size: int = 8,
    class_name: str | None = None,
) -> list[Skipped]:
    """Segments clips into `out/videos`, and prints a line for each.

    Returns:
        The clips that could not be read to their end, with the reasons.
    """
    skipped = []
    for path, name in zip(clips, unique_names(clips), strict=True):
        folder = out / FOLDER / name
        try:
            count = segment_clip(model, path, folder, smooth, batch_size, class_name)
        except ClipError as error:
            console.warn(f"passed over: {error}")
            skipped.append(Skipped(str(path), str(error)))
        else:
            console.say(f"{folder}: parts of {count} frames")
    return skipped
