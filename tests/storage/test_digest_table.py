"""Keys as numbers: found where they are, not found where only half of them is."""

from __future__ import annotations

import numpy as np
from chroma_trainer.trainer_core.storage.atomic import sha256_text
from chroma_trainer.trainer_core.storage.digest_table import DigestTable, argsort_rows, digests, first_of_each


def test_digests_are_in_the_order_of_hex_keys_and_differ_where_keys_do():
    keys = [sha256_text(str(i)) for i in range(200)]
    assert [keys[i] for i in argsort_rows(digests(keys))] == sorted(keys)
    strange = ["", "a", "A", "\udcff", " " * 64, "0" * 64, "z" * 64, keys[0], keys[0].upper() + "0"]
    assert len(first_of_each(digests(strange))) == len(strange)
    assert first_of_each(digests(["b", "a", "b", "c", "a"])).tolist() == [0, 1, 3]
    assert digests([]).shape == (0, 2)


def test_keys_that_share_half_their_bits_are_told_apart():
    keys = np.array([(5, 9), (5, 1), (2**64 - 1, 0), (5, 4), (0, 0)], dtype=np.uint64)
    table = DigestTable(keys, np.arange(5))
    asked = np.concatenate(
        (keys, np.array([(5, 0), (5, 5), (5, 10), (6, 9), (2**64 - 1, 1), (2**64 - 2, 0)], dtype=np.uint64))
    )
    found = table.find(asked)
    assert table.values[found[:5]].tolist() == [0, 1, 2, 3, 4] and (found[5:] == -1).all()
    assert DigestTable(keys[:0], np.arange(0)).find(keys).tolist() == [-1] * 5
