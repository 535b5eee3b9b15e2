from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from small_runs import photo

import slotscops
from slotscops.core.errors import RunError, UserError
from slotscops.segment import __main__ as segment
from slotscops.segment import video
from slotscops.segment.segmenter import FoundParts

TIMES = [0, 3, 4, 9, 10, 11, 13, 20, 21, 22, 26, 27]  # in fifteenths of a second: the clip's rate is not constant
_UPRIGHT = b"\0\1\0\0" + bytes(12) + b"\0\1\0\0" + bytes(12) + b"@\0\0\0"  # MP4's matrix that turns nothing
_QUARTER_TURN = bytes(4) + b"\0\1\0\0" + bytes(4) + b"\xff\xff\0\0" + bytes(16) + b"@\0\0\0"  # clockwise


def drawn(number: int, width: int = 64, height: int = 48) -> NDArray[np.uint8]:
    """Frame `number` of the toy clip: blots that wander to the right, and grow brighter."""
    moved = np.roll(np.array(photo((width, height))), 3 * number, axis=1)
    return (moved * (0.4 + 0.05 * number)).astype(np.uint8)


def write_clip(path: Path, size: tuple[int, int] = (64, 48), codec: str = "libx264") -> Path:
    """A clip of the toy frames, each shown until the next one."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=15, options={"crf": "10", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 15)
        for number, (time, ends) in enumerate(zip(TIMES, [*TIMES[1:], 28], strict=True)):
            frame = av.VideoFrame.from_ndarray(drawn(number, *size), "rgb24")
            frame.pts, frame.time_base, frame.duration = time, Fraction(1, 15), ends - time
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read_clip(path: Path) -> list[tuple[float, NDArray[np.uint8]]]:
    """Second and pixels of each frame."""
    with av.open(str(path)) as container:
        return [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def read_labels(folder: Path) -> list[NDArray[np.uint8]]:
    return [np.array(Image.open(path)) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "cow.mp4")


@pytest.fixture(scope="module")
def out(clip: Path, varied_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    common = ["--checkpoint", str(varied_run), "--out", str(folder), "--batch-size", "5", "--smooth", "0.7"]
    assert segment.main([*common, str(clip)]) == 0
    return folder


def test_the_overlay_has_the_frames_times_and_size_of_the_clip(clip: Path, out: Path) -> None:
    given, painted = read_clip(clip), read_clip(out / "videos" / "cow" / "overlay.mp4")
    assert [time for time, _ in painted] == pytest.approx([time / 15 for time in TIMES])
    with av.open(str(clip)) as first, av.open(str(out / "videos" / "cow" / "overlay.mp4")) as second:
        rates = [container.streams.video[0].average_rate for container in (first, second)]
        lengths = [container.duration for container in (first, second)]
    assert rates[0] == rates[1]
    assert lengths[0] == lengths[1]
    labels = read_labels(out / "videos" / "cow" / "parts")
    assert len(labels) == len(painted) == len(given)
    for (_, before), (_, after), label in zip(given, painted, labels, strict=True):
        assert before.shape == after.shape
        inside = label == 0  # the background is unchanged, but for what the encoder loses near parts
        if inside.mean() > 0.2:
            assert abs(before[inside].mean() - after[inside].mean()) < 8


def test_label_maps_are_those_of_soft_maps_smoothed_over_the_frames_in_their_order(
    clip: Path, out: Path, varied_run: Path
) -> None:
    model = slotscops.load(varied_run)
    mean: NDArray[np.float32] | None = None
    labels = read_labels(out / "videos" / "cow" / "parts")
    alone = []
    for (_, frame), found in zip(read_clip(clip), labels, strict=True):
        maps = model.segment(Image.fromarray(frame)).maps
        mean = maps if mean is None else 0.7 * mean + 0.3 * maps
        assert (found == mean.argmax(axis=0)).mean() > 0.999  # a batch differs from one frame by rounding
        alone.append((found == maps.argmax(axis=0)).mean())
    assert min(alone) < 0.98, "smoothing has changed nothing"


def test_without_smoothing_each_frame_stands_alone(clip: Path, varied_run: Path, tmp_path: Path) -> None:
    model = slotscops.load(varied_run)
    assert video.segment_clip(model, clip, tmp_path / "cow", smooth=0) == len(TIMES)
    for (_, frame), found in zip(read_clip(clip), read_labels(tmp_path / "cow" / "parts"), strict=True):
        assert (found == model.segment(Image.fromarray(frame)).labels).mean() > 0.999


def test_frames_of_a_pruned_model_have_the_labels_of_the_whole_one(
    clip: Path, run_with_dead: Path, published: Path, tmp_path: Path
) -> None:
    for path in (run_with_dead, published):
        assert video.segment_clip(slotscops.load(path), clip, tmp_path / path.name, smooth=0.7) == len(TIMES)
    before, after = (read_labels(tmp_path / path.name / "parts") for path in (run_with_dead, published))
    assert set(np.unique(after)) == {0, 1, 2, 4, 5}
    assert (np.array(after) == np.array(before)).mean() > 0.999  # the shares differ by rounding


def test_a_smoother_gives_the_same_labels_strip_by_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slotscops.segment.segmenter._STRIP_PIXELS", 50)
    generator = np.random.default_rng(0)
    smoother, mean = video.Smoother(0.6), np.zeros(())
    for number in range(4):
        logits = generator.normal(size=(3, 5, 5)).astype(np.float32)
        parts = FoundParts(np.zeros((12, 16, 3), np.uint8), logits)
        mean = parts.maps if number == 0 else 0.6 * mean + 0.4 * parts.maps
        assert (smoother.labels(parts) == mean.argmax(axis=0)).all()


def test_a_clip_that_a_phone_turned_comes_out_upright(clip: Path, varied_run: Path, tmp_path: Path) -> None:
    before, header, after = clip.read_bytes().rpartition(_UPRIGHT)
    assert header
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(before + _QUARTER_TURN + after)
    assert video.segment_clip(slotscops.load(varied_run), turned, tmp_path / "turned", smooth=0) == len(TIMES)
    assert read_labels(tmp_path / "turned" / "parts")[0].shape == (64, 48)
    with video.open_clip(turned) as opened:
        frame = next(opened.frames()).photo
    clockwise = np.rot90(read_clip(clip)[0][1], -1)
    assert np.abs(frame.astype(int) - clockwise).mean() < 1


def test_a_clip_of_odd_sides_keeps_its_size(varied_run: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "odd.avi", (63, 47), "mpeg4")
    video.segment_clip(slotscops.load(varied_run), clip, tmp_path / "odd", smooth=0.5)
    assert read_clip(tmp_path / "odd" / "overlay.mp4")[0][1].shape == (47, 63, 3)


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
@pytest.mark.parametrize("share", [0.05, 0.6])
def test_a_truncated_clip_is_one_line_and_leaves_nothing(
    varied_run: Path, tmp_path: Path, ending: str, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_clip(tmp_path / f"whole{ending}")
    content = whole.read_bytes()
    if ending == ".mp4":  # with its table in front, so that the first frames can be read
        with (
            av.open(str(whole)) as source,
            av.open(str(tmp_path / "f.mp4"), "w", options={"movflags": "faststart"}) as to,
        ):
            stream = to.add_stream_from_template(source.streams.video[0])
            for packet in source.demux():
                if packet.dts is not None:
                    packet.stream = stream
                    to.mux(packet)
        content = (tmp_path / "f.mp4").read_bytes()
    cut = tmp_path / f"cut{ending}"
    cut.write_bytes(content[: int(share * len(content))])
    capsys.readouterr()
    with pytest.raises(RunError, match="no clip could be read"):
        segment.main(["--checkpoint", str(varied_run), "--out", str(tmp_path / "out"), str(cut)])
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(f"slotscops: passed over: {cut}: is ")
    assert not any((tmp_path / "out").rglob("*.*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--smooth", "1"], "--smooth 1.0: give a share of at least 0 and below 1"),
        (["--smooth", "nan"], "--smooth nan: give a share"),
        (["--soft"], "--soft: is for photos only"),
        (["--format", "labelme"], "--format: is for photos only"),
    ],
)
def test_a_mistake_is_told_before_the_model_is_loaded(clip: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        segment.main(["--checkpoint", "nowhere", "--out", "nowhere", *options, str(clip)])


def test_without_pyav_the_command_says_what_to_install(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install it with pip install 'slotscops\[video\]'"):
        segment.main(["--checkpoint", "nowhere", "--out", "nowhere", str(clip)])


def test_a_second_call_replaces_the_results_of_the_first(clip: Path, varied_run: Path, tmp_path: Path) -> None:
    (tmp_path / "cow" / "parts").mkdir(parents=True)
    (tmp_path / "cow" / "parts" / "999999.png").touch()
    video.segment_clip(slotscops.load(varied_run), clip, tmp_path / "cow", smooth=0.5)
    assert len(list((tmp_path / "cow" / "parts").iterdir())) == len(TIMES)
    assert [path.name for path in tmp_path.iterdir()] == ["cow"]
