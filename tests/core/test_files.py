import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotscops.core.files import sha256_of_json, size_of_file

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
contents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20), max_leaves=60
)


class Made(Sequence[Any]):
    """A list that makes its rows when it is asked for them."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        return self._rows[number]


@settings(deadline=None)
@given(contents, st.lists(contents, max_size=5))
def test_the_hash_is_that_of_the_whole_text_though_it_is_made_in_pieces(content: Any, rows: list[Any]) -> None:
    whole = {"content": content, "rows": rows}
    expected = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    assert sha256_of_json(whole) == sha256_of_json(whole | {"rows": Made(rows)}) == expected


def test_keys_that_are_no_text_are_hashed_as_json_writes_them() -> None:
    content = {2: [1], 10: {"a": [2]}}
    assert sha256_of_json(content) == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def test_the_size_of_a_file_is_none_where_there_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"four")
    assert size_of_file(tmp_path / "file") == 4
    for name in ("missing", ".", "file/below"):
        assert size_of_file(tmp_path / name) is None
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        size_of_file(tmp_path / "loop")
