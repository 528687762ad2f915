"""The files beside tfrecords; tests/tasks/test_p3_damaged.py damages the records themselves."""

import json

import pytest

from pemoe_jax.core.errors import InputError
from pemoe_jax.data import tfrecords


@pytest.mark.parametrize("examples", [10**30, 2**63, 3, -1, 1.5, None])
def test_a_number_of_rows_that_the_files_cannot_have(tmp_path, examples):
    record = (30).to_bytes(8, "little") + bytes(4 + 30 + 4)  # its checksums are not read here
    (tmp_path / "train.tfrecord-00000-of-00001").write_bytes(record)
    (tmp_path / "info.train.json").write_text('{"num_shards": 1}')
    stats = tmp_path / "stats.train.json"
    reader = tfrecords.TFRecordReader(tmp_path, "train", lambda: 100)
    stats.write_text(json.dumps({"examples": examples}))
    with pytest.raises(InputError, match=r"stats.train.json: 'examples' must be .* up to 2, "):
        _ = reader.num_rows
    stats.write_text('{"examples": 1}')
    assert reader.num_rows == 1
