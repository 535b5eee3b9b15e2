import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slotscops.core.errors import DamageError, RunError, UserError
from slotscops.core.files import sha256_of_json
from slotscops.features.manifest import IDENTITY, FileTable, read_manifest, write_manifest
from slotscops.features.rows import FeatureShard, encode

any_float16 = hnp.arrays(
    np.uint16,
    st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    elements=st.one_of(st.just(0), st.integers(0, 2**16 - 1)),
).map(lambda bits: bits.view(np.float16))


def stored(folder: Path, features: np.ndarray) -> FeatureShard:
    path = folder / "train-000000.safetensors"
    path.write_bytes(encode(features))
    return FeatureShard(path)


@settings(deadline=None, max_examples=200)
@given(features=any_float16)
def test_any_finite_features_come_back_bit_for_bit_and_others_are_damage(
    tmp_path_factory: pytest.TempPathFactory, features: np.ndarray
) -> None:
    shard = stored(tmp_path_factory.mktemp("features"), features)
    assert len(shard) == len(features)
    assert shard.shape == features.shape[1:]
    damaged = [row for row, expected in enumerate(features) if not np.isfinite(expected).all()]
    assert shard.rows_not_finite() == damaged
    for row, expected in enumerate(features):
        if row in damaged:
            with pytest.raises(DamageError, match=f"row {row} is damaged .it holds NaN or infinity"):
                shard.read_rows([row])
        else:
            assert (shard[row].numpy().view(np.uint16) == expected.view(np.uint16)).all()


def sparse_maps(shape: tuple[int, ...], share: float, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    values = generator.normal(size=shape).astype(np.float16)
    return np.where(generator.random(shape) < share, values, np.float16(0)).astype(np.float16)


def test_mostly_zero_features_are_stored_sparse_and_full_ones_dense(tmp_path: Path) -> None:
    assert stored(tmp_path, sparse_maps((3, 512, 8, 8), 0.05)).encoding == "sparse"
    assert (tmp_path / "train-000000.safetensors").stat().st_size < 3 * 512 * 64 * 2 / 5
    assert stored(tmp_path, sparse_maps((3, 512, 8, 8), 1.0)).encoding == "dense"


def test_maps_of_more_than_65536_values_keep_their_places(tmp_path: Path) -> None:
    features = sparse_maps((3, 1024, 16, 16), 0.05)
    shard = stored(tmp_path, features)
    assert shard.encoding == "sparse"
    assert (shard.read_rows([2, 0]).numpy() == features[[2, 0]]).all()
    for value in (np.nan, -np.inf):
        features[1, 1023, 15, 15] = value  # in the last of the row's segments
        assert stored(tmp_path, features).rows_not_finite() == [1]


def test_places_and_values_of_a_row_are_those_of_its_dense_map(tmp_path: Path) -> None:
    features = sparse_maps((3, 1024, 16, 16), 0.05)
    shard = stored(tmp_path, features)
    for row, expected in enumerate(features):
        sparse = shard.read_sparse_row(row)
        assert sparse is not None
        assert len(sparse[0]) == len(sparse[1]) == shard.num_sparse_values(row)
        dense = np.zeros(expected.size, np.float16)
        dense[sparse[0]] = sparse[1]
        assert (dense == expected.reshape(-1)).all()
    full = stored(tmp_path, sparse_maps((2, 4, 3, 3), 1.0))
    assert full.read_sparse_row(0) is full.num_sparse_values(0) is None


def test_a_place_beyond_the_map_never_reaches_a_gpu(tmp_path: Path) -> None:
    shard = stored(tmp_path, sparse_maps((2, 64, 3, 3), 0.1))
    shard.shape = (4, 3, 1)  # as if the file said so
    with pytest.raises(DamageError, match="a position beyond the map"):
        shard.read_sparse_row(0)


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_rows_land_in_the_places_asked_for(tmp_path: Path, share: float) -> None:
    features = sparse_maps((5, 4, 3, 3), share)
    batch = np.zeros((4, 36), np.float16)
    shard = stored(tmp_path, features)
    shard.read_row_into(0, batch[3])
    shard.read_row_into(4, batch[1])
    assert (batch[3] == features[0].reshape(-1)).all()
    assert (batch[1] == features[4].reshape(-1)).all()
    assert not batch[[0, 2]].any()


def test_a_row_beyond_the_end_is_an_index_error_and_negative_rows_count_back(tmp_path: Path) -> None:
    shard = stored(tmp_path, sparse_maps((2, 4, 3, 3), 0.1))
    assert (shard[-1] == shard[1]).all()
    with pytest.raises(IndexError):
        shard[2]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_damaged_file_is_a_one_line_error_or_readable(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(encode(sparse_maps((2, 16, 4, 4), 0.1)))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    path.write_bytes(content)
    try:
        FeatureShard(path).read_rows(range(len(FeatureShard(path))))
    except (UserError, RunError) as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def test_a_table_of_files_is_the_mapping_that_it_was_made_of() -> None:
    rows = {
        f"train-{number:06d}": {
            "sha256": hashlib.sha256(bytes([number])).hexdigest(),
            "bytes": 10**12 + number,
            "encoding": "sparse" if number % 3 else "dense",
            "negative": number % 2 == 0,
        }
        for number in (5, 0, 7, 3)
    }
    table = FileTable(rows)
    assert table == rows
    assert sha256_of_json(table) == sha256_of_json(rows)
    assert pickle.loads(pickle.dumps(table)) == rows
    assert "train-000004" not in table
    assert "val-000000" not in table
    assert len(FileTable({})) == 0


@pytest.mark.parametrize("name", ["\ud800", "../x", "a\0", ""])
def test_a_manifest_that_lists_a_file_of_a_strange_name_is_refused(tmp_path: Path, name: str) -> None:
    row = {"sha256": "0" * 64, "bytes": 1, "encoding": "dense"}
    path, identity = tmp_path / "manifest.json", dict.fromkeys(IDENTITY, "")
    write_manifest(path, identity, (1, 2, 3), {"train-000000": row})
    assert list(read_manifest(path)["files"]) == ["train-000000"]
    write_manifest(path, identity, (1, 2, 3), {name: row})
    with pytest.raises(UserError, match="table of files is damaged"):
        read_manifest(path)
