"""A fingerprint of prepared rows, by which a run that goes on knows the data that it was begun with."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

_FIELDS = (("input_ids", "i4"), ("loss_mask", "?"), ("document_starts", "i4"))


class RowsDigest:
    """Hashes rows in the order in which they are added; its `str` has 16 hexadecimal digits."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, row: Mapping[str, Any]) -> None:
        for name, dtype in _FIELDS:
            values = np.asarray(row[name], dtype)
            self._hash.update(len(values).to_bytes(8, "little") + values.tobytes())

    def __str__(self) -> str:
        return self._hash.hexdigest()[:16]


def digest_of(data: Any) -> str:
    """The fingerprint of prepared data, with stored features or without: what `coral data prepare` recorded,
    else that of the rows in `data.dataset`.
    """
    if recorded := getattr(data, "info", {}).get("digest"):
        return str(recorded)
    digest = RowsDigest()
    for index in range(len(data.dataset)):
        digest.add(data.dataset[index])
    return str(digest)
