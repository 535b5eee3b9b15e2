"""Files that appear whole or not at all, and their hashes."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replace_when_complete(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`, which is fsynced and renamed to `path` if the body ends without error.

    The temporary name starts with a dot and ends in `.partial`; it is removed when the body raises.
    """
    # The name is cut so that the temporary name stays legal: 40 characters are at most 160 bytes of UTF-8.
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".partial", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_current_umask())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Makes a file's content, or the renames inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    with replace_when_complete(path) as file:
        file.write(content)


def decode_text(content: bytes) -> str:
    """The text of a file that a person wrote: UTF-8, or UTF-16 where it begins with a byte order mark.

    Some editors begin a file with a byte order mark, which is no part of the text.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    if "\0" in text:  # UTF-16 or UTF-32 without its mark
        raise UnicodeDecodeError("utf-8", content, 0, 1, "holds zeros, as no text does")
    return text


def json_numbers(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The scores with NaN replaced by None, because JSON has no NaN."""
    return {name: None if value != value else value for name, value in scores.items()}


def write_json(path: Path, content: Any) -> None:
    # Bytes of a file name that are not UTF-8 are lone surrogates in Python, which JSON holds only as escapes.
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def sha256_of_file(path: Path) -> str:
    """Hex digest of the file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_of_json(content: Any) -> str:
    """Hex digest of the content as JSON with sorted keys, so that equal content gives an equal digest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
