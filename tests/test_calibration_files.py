"""Calibration files whose tensors are not plain ones: one line each, before anything large is made."""

from __future__ import annotations

import json
import struct

import pytest
import torch

from rotatekv.errors import UserError
from rotatekv.statistics import load_reorder_indices

LAYERS, CHANNELS = 2, 48
ROWS = torch.stack([torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(n)) for n in range(LAYERS)])
HUGE = torch.zeros(1, dtype=torch.int32).expand(10**6, 10**6)  # a few bytes on disk, terabytes as int64
NOT_TABLES = {
    "sparse": lambda: ROWS.to_sparse(),
    "sparse csr": lambda: ROWS.to_sparse_csr(),
    "list of sparse": lambda: [row.to_sparse() for row in ROWS],
    "nested": lambda: torch.nested.nested_tensor(list(ROWS)),
    "jagged": lambda: torch.nested.nested_tensor(list(ROWS), layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(ROWS.float(), 1.0, 0, torch.qint8),
    "complex": lambda: ROWS.to(torch.complex64),
    "dict of complex": lambda: {number: row.to(torch.complex64) for number, row in enumerate(ROWS)},
    "float": lambda: ROWS.double(),
    "NaN": lambda: torch.full((LAYERS, CHANNELS), float("nan")),
    "bool": lambda: ROWS.bool(),
    "meta": lambda: ROWS.to("meta"),
    "huge": lambda: HUGE,
    "list of huge": lambda: list(HUGE.view(-1)[None].expand(LAYERS, -1)),
    "beyond int64": lambda: [[2**70] * CHANNELS] * LAYERS,
    "rows of two lengths": lambda: [ROWS[0], ROWS[1, :-1]],
    "no rows": lambda: ROWS[:0],
    "no channels": lambda: ROWS[:, :0],
    "negative": lambda: ROWS - 1,
    "twice the same": lambda: ROWS.clamp(max=46),
    "too large": lambda: ROWS + 2**40,
}


def load(path) -> torch.Tensor:
    return load_reorder_indices("tiny", LAYERS, CHANNELS, 3, path).indices


def refused(path) -> str:
    with pytest.raises(UserError) as caught:
        load(path)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and str(path) in text and "make it with calibrate_reorder.py" in text
    return text


@pytest.mark.filterwarnings("ignore")  # torch's, that sparse, nested and quantized tensors are in beta or deprecated
@pytest.mark.parametrize("kind", NOT_TABLES)
def test_tensors_that_are_no_table_of_integers_are_one_line(tmp_path, kind):
    torch.save(NOT_TABLES[kind](), tmp_path / "authors.pt")
    text = refused(tmp_path / "authors.pt")
    if kind in ("sparse", "nested", "quantized", "complex", "meta"):
        assert {"sparse": "sparse_coo", "quantized": "qint8"}.get(kind, kind) in text
    assert "alloc" not in text, "nothing large was asked for"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64])
def test_integers_of_every_width_are_read(tmp_path, dtype):
    torch.save(ROWS.to(dtype), tmp_path / "authors.pt")
    torch.save([row.to(dtype) for row in ROWS], tmp_path / "rows.pt")
    assert torch.equal(load(tmp_path / "authors.pt"), ROWS) and torch.equal(load(tmp_path / "rows.pt"), ROWS)


def write_safetensors(path, dtype: str, shape: list[int], content: bytes):
    """By hand: safetensors' own writer takes no such dtypes and shapes."""
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(content)]}
    header = json.dumps({"__metadata__": {"format": "1"}, "indices": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content)
    return path


@pytest.mark.parametrize(
    ("dtype", "shape", "content"),
    [
        *(
            (dtype, [LAYERS, CHANNELS], bytes(LAYERS * CHANNELS * bits // 8))
            for dtype, bits in (
                ("F4", 4),
                ("F6_E2M3", 6),
                ("F8_E4M3", 8),
                ("F8_E8M0", 8),
                ("BF16", 16),
                ("F64", 64),
                ("C64", 64),
                ("BOOL", 8),
                ("U64", 64),
                ("NEW", 8),
            )
        ),
        ("I64", [0, CHANNELS], b""),
        ("I64", [LAYERS, 0], b""),
        ("I64", [10**9, 10**9], bytes(16)),
        ("I64", [LAYERS, CHANNELS], (ROWS - 1).numpy().tobytes()),
        ("I64", [LAYERS, CHANNELS], ROWS.clamp(max=46).numpy().tobytes()),
    ],
    ids=lambda value: "bytes" if isinstance(value, bytes) else str(value),
)
def test_safetensors_of_other_numbers_and_shapes_are_one_line(tmp_path, dtype, shape, content):
    refused(write_safetensors(tmp_path / "new.safetensors", dtype, shape, content))


def test_a_safetensors_file_of_narrow_integers_is_read(tmp_path):
    content = ROWS.to(torch.int16).numpy().tobytes()
    assert torch.equal(load(write_safetensors(tmp_path / "new.safetensors", "I16", [LAYERS, CHANNELS], content)), ROWS)
