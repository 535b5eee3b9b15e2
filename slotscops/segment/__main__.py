"""Finds the parts in photos and makes a page that shows them all. Finds the parts in clips, too.

    python -m slotscops.segment --checkpoint RUN --out DIR PHOTO_OR_FOLDER_OR_CLIP...

For each photo it writes `NAME.parts.png` (indexed, pixel value = part label, VOC colours), `NAME.overlay.jpg`, and with
`--soft` also `NAME.maps.safetensors` (`maps`: (S, H, W) float32). `DIR/index.html` shows all of them and opens from
disk. `--format` and `--features` add files for other programs, and `--name-from` names the parts; see README.md beside
this file. The results of a clip lie in `DIR/videos`, see `video`.

The exit code is 0 if at least one photo or clip was segmented. It is 1 if none could be segmented, or with `--strict`
if any file was passed over. It is 2 for a mistake in the command. Files that were passed over are listed with the
reason, on stderr and in the page. Hidden files and files of operating systems are only counted.
"""

import argparse
import errno
import io
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.numpy import save

from slotscops.core import console
from slotscops.core.address import hide_secrets
from slotscops.core.batching import batches_by_pixels
from slotscops.core.command_line import command_parser, program_name
from slotscops.core.errors import RunError, UserError, first_line, shorten
from slotscops.core.files import write_bytes
from slotscops.core.photos import PHOTO_SUFFIXES, PassedOver, find_photos, read_photo, shown_name, unique_names
from slotscops.core.pictures import label_image, picture_bytes
from slotscops.core.pool import usable_cores
from slotscops.segment.formats import FORMATS, About, ResultFile, common_folder, open_formats, read_formats
from slotscops.segment.gallery import Entry, Gallery, Skipped, write_pictures
from slotscops.segment.names import joined_names, shown_names, write_names
from slotscops.segment.naming import name_parts
from slotscops.segment.segmenter import FoundParts, Segmenter, load
from slotscops.segment.video import check_can_segment, is_clip, segment_clips

_LONGEST_COMMAND = 2000  # characters; a shell writes out every photo of photos/*.jpg
_Photo = tuple[Path, Image.Image, str]  # with the name of its results
_ERRORS_OF_ONE_NAME = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL)


def _batches(named: Iterable[tuple[Path, str]], size: int, skipped: list[Skipped]) -> Iterator[list[_Photo]]:
    """Yields the readable photos, `size` at a time. Adds the others to `skipped` with the reason."""
    return batches_by_pixels(_readable(named, skipped), lambda photo: photo[1].width * photo[1].height, size)


def _readable(named: Iterable[tuple[Path, str]], skipped: list[Skipped]) -> Iterator[_Photo]:
    for path, name in named:
        try:
            yield path, read_photo(path), name  # kept in no variable, so that the caller can free the photo
        except UserError as error:
            skipped.append(Skipped(str(path), str(error)))


def _find_parts(
    model: Segmenter, batch: list[_Photo], class_name: str | None, skipped: list[Skipped]
) -> list[tuple[Path, str, FoundParts]]:
    """Segments a batch and empties it, so that its images are freed. A photo without memory for it is skipped."""
    items = list(batch)
    batch.clear()
    with suppress(MemoryError):
        found = model.segment_batch([image for _, image, _ in items], class_name)
        return [(path, name, parts) for (path, _, name), parts in zip(items, found, strict=True)]
    # The error is gone, and with it what its traceback holds of the batch.
    if len(items) > 1:
        return [parts for item in items for parts in _find_parts(model, [item], class_name, skipped)]
    path = items[0][0]
    skipped.append(Skipped(str(path), f"{shown_name(path)}: there is no memory for it; make it smaller"))
    return []


def _write(
    out: Path,
    name: str,
    parts: FoundParts,
    num_slots: int,
    soft: bool,
    path: Path,
    files: Sequence[ResultFile],
) -> tuple[Entry, list[Any]]:
    """Writes the files of one photo. Returns what goes into the page and into the files of all photos."""
    write_bytes(out / f"{name}.parts.png", picture_bytes(label_image(parts.labels)))
    overlay = io.BytesIO()
    parts.overlay().save(overlay, "JPEG", quality=92)
    write_bytes(out / f"{name}.overlay.jpg", overlay.getvalue())
    if soft:
        write_bytes(out / f"{name}.maps.safetensors", save({"maps": parts.maps}))
    entry = write_pictures(out, name, parts.photo, parts.winners, num_slots)
    return entry, [file.describe(path, name, parts) for file in files]


def segment_all(
    model: Segmenter,
    photos: Sequence[Path],
    out: Path,
    gallery: Gallery,
    batch_size: int,
    soft: bool,
    class_name: str | None = None,
    files: Sequence[ResultFile] = (),
) -> list[Skipped]:
    """Segments the photos, writes their files and adds them to the gallery.

    Args:
        batch_size: photos that the model sees at once.
        soft: write the soft maps too.
        class_name: class of all photos, see `Segmenter.segment`.
        files: further files to which each photo is added, see `formats`.

    Returns:
        The photos that could not be read or written, with the reasons.
    """
    skipped: list[Skipped] = []
    names = unique_names(photos, ".maps.safetensors" if soft else ".overlay.jpg")
    named = console.track(zip(photos, names, strict=True), len(photos), "photos")
    with ThreadPoolExecutor(usable_cores()) as pool:  # Pillow releases the GIL while it compresses pictures
        for batch in _batches(named, batch_size, skipped):
            found = _find_parts(model, batch, class_name, skipped)
            paths = [path for path, _, _ in found]
            num_slots = model.network.num_slots
            jobs = [pool.submit(_write, out, name, parts, num_slots, soft, path, files) for path, name, parts in found]
            del found
            for path, job in zip(paths, jobs, strict=True):
                try:
                    entry, described = job.result()
                except Exception as error:  # Pillow raises many kinds, for example for photos too large for JPEG
                    if isinstance(error, OSError) and error.errno not in (None, *_ERRORS_OF_ONE_NAME):
                        raise  # for example a full disk, which the photo did not cause
                    skipped.append(
                        Skipped(str(path), f"{shown_name(path)}: cannot be written ({first_line(error)[:200]})")
                    )
                    continue
                gallery.add(entry)
                for file, of_photo in zip(files, described, strict=True):
                    file.add(of_photo)
    return skipped


def _part_names(model: Segmenter, options: argparse.Namespace) -> dict[str, list[str]]:
    """A name for each part by class: from `--part-names`, from `--name-from`, from the model's folder, or numbers."""
    num_parts = model.network.num_slots - 1
    if options.part_names is not None:
        names = [name.strip() for name in options.part_names.split(",")]
        if len(names) != num_parts or not all(names):
            raise UserError(
                f"--part-names {options.part_names}: {len(names)} names, the model has {num_parts} parts; give one for "
                "each"
            )
        return dict.fromkeys(shown_names(None, model.class_names, model.part_numbers), names)
    if options.name_from is not None:
        name_parts(model, options.name_from, options.parts, options.class_name)
        if Path(options.checkpoint).exists():
            try:
                write_names(model.trained.path, model.names)
            except OSError as error:
                console.warn(f"{model.trained.path}: the names are not kept there ({error.strerror})")
        else:
            console.say("the names are kept only beside a model on this machine, not beside one from the hub")
    return shown_names(model.names, model.class_names, model.part_numbers)


def _tell_passed_over(passed_over: Sequence[PassedOver]) -> list[Skipped]:
    """Prints one line for each reason, with its count and an example. Returns the faults, which the page lists."""
    counts = Counter(item.kind for item in passed_over)
    for kind, count in sorted(counts.items()):
        first = next(item for item in passed_over if item.kind == kind)
        tell = console.warn if first.is_fault else console.say
        tell(f"passed over: {count} x {kind}, such as {shown_name(first.path)}: {first.reason}")
    return [Skipped(str(item.path), f"{shown_name(item.path)}: {item.reason}") for item in passed_over if item.is_fault]


def _clips(options: argparse.Namespace) -> list[Path]:
    """The clips among the given files, each once. A clip inside a folder of photos is not taken.

    Raises:
        UserError: if there are clips that cannot be read here, or options that go with photos only.
    """
    clips = list(dict.fromkeys(path for path in options.photos if is_clip(path)))
    if clips:
        check_can_segment(options.smooth)
        of_photos = {"--soft": options.soft, "--format": options.formats, "--features": options.features}
        for option in (name for name, is_given in of_photos.items() if is_given):
            raise UserError(
                f"{option}: is for photos only; leave it out, or give {shown_name(clips[0])} a call of its own"
            )
    return clips


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "segment",
        "Find the parts in photos and make a page that shows them.",
        "--checkpoint runs/toy --out parts photos/",
        "Exit code 0: at least one photo was segmented; those that could not be read are listed.\n"
        "Exit code 1: no photo could be read, or with --strict any file was passed over. Exit code 2: a"
        " user's mistake.",
    )
    parser.add_argument("--checkpoint", required=True, help="a run, one of its checkpoints, or a model's id on the hub")
    parser.add_argument("--out", type=Path, required=True, help="folder for label maps, overlays and the page")
    parser.add_argument("--soft", action="store_true", help="also write the share of each part in each pixel")
    parser.add_argument(
        "--format", dest="formats", action="append", default=[], metavar="A,B,...",
        help="files for other programs, in addition to label maps, overlays and the page, which are always written:"
        f" {', '.join(FORMATS)}",
    )  # fmt: skip
    parser.add_argument(
        "--features", action="store_true",
        help="also write features, boxes and centres of the parts of all photos into one file",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=16, help="photos that the model sees at once (default: 16)")
    naming = parser.add_mutually_exclusive_group()
    naming.add_argument("--part-names", metavar="A,B,...", help="names of parts 1 to K in the page and in all formats")
    naming.add_argument(
        "--name-from", type=Path, metavar="LABELLED",
        help="name the parts after the true parts of a few labelled photos (a folder of photos with label maps, or of"
        " shards), and keep the names beside the model",
    )  # fmt: skip
    parser.add_argument(
        "--parts", type=Path,
        help="for --name-from: folder of label PNGs, as for shard --images (default: the sub-folder with parts.txt)",
    )  # fmt: skip
    parser.add_argument(
        "--class", dest="class_name", metavar="NAME",
        help="class of all photos, for a multi-class model (default: guessed for each photo)",
    )  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="exit code 1 if any file was passed over")
    parser.add_argument(
        "--teacher-weights", help="weights of the teacher, for a model that was trained on cached features"
    )
    parser.add_argument(
        "--smooth", type=float, default=0.5, metavar="SHARE",
        help="for clips: share of the earlier frames in the soft maps of each; 0 takes each frame alone (default: 0.5)",
    )  # fmt: skip
    parser.add_argument(
        "photos", type=Path, nargs="+", metavar="PHOTO_OR_FOLDER_OR_CLIP", help="photos, folders of photos, or clips"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: give 1 or more")
    if options.parts and not options.name_from:
        raise UserError(f"--parts {options.parts}: goes with --name-from, which names the labelled photos")
    formats = read_formats(options.formats)
    clips = _clips(options)
    photos, passed_over = find_photos([path for path in options.photos if path not in clips], options.out)
    not_taken = _tell_passed_over(passed_over)
    if not photos and not clips:
        raise UserError(
            f"no photos in {', '.join(map(str, options.photos))}; needed {', '.join(sorted(PHOTO_SUFFIXES))}"
        )
    model = load(options.checkpoint, options.teacher_weights)
    if options.class_name is not None:
        model.class_id(options.class_name)  # before the results of an earlier call are replaced
    part_names = _part_names(model, options)
    not_taken += segment_clips(model, clips, options.out, options.smooth, options.batch_size, options.class_name)
    if not photos:
        if len(not_taken) >= len(clips):
            raise RunError("no clip could be read")
        return 1 if options.strict and not_taken else 0
    name = Path(options.checkpoint).name
    shown = {options.class_name: part_names[options.class_name]} if options.class_name in part_names else part_names
    gallery = Gallery.begin(options.out, name, joined_names(shown), options.soft, model.part_numbers)
    given = shlex.join(sys.argv[1:] if arguments is None else arguments)
    command = shorten(hide_secrets(f"{program_name('segment')} {given}"), _LONGEST_COMMAND)
    about = About(name, command, part_names, common_folder(photos), model.part_numbers)
    with open_formats(formats, options.features, options.out, about) as files:
        skipped = segment_all(
            model, photos, options.out, gallery, options.batch_size, options.soft, options.class_name, files
        )
        for photo in skipped:
            console.warn(f"passed over: {photo.reason}")
        if len(skipped) == len(photos):
            raise RunError("no photo could be read")
    not_taken += skipped
    page = gallery.finish(not_taken)
    console.say(f"{page}: parts of {len(photos) - len(skipped)} photos, {len(not_taken)} passed over")
    if formats or options.features:
        console.say(f"names of photos in the files for other programs are relative to {about.folder}")
    return 1 if options.strict and not_taken else 0


if __name__ == "__main__":
    console.run_command(main)
