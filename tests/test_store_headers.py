"""The strict header reader and the byte reader against real files, broken files, and safetensors itself."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qmerge.errors import Interrupted, Refused
from qmerge.store.headers import TORCH_DTYPES, dtype_name, read_header
from qmerge.store.tensors import read_tensor


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def row(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def refusal(path):
    with pytest.raises(Refused) as caught:
        read_header(path)
    return str(caught.value)


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(3, dtype=torch.uint8)}, path, {"format": "pt"})
    return path


def test_agrees_with_safetensors_on_every_dtype(tmp_path):
    """A wrong dtype name, start or byte count would read other numbers than the reference loader does."""
    path = tmp_path / "all.safetensors"
    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in TORCH_DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3.5, dtype=torch.bfloat16), "empty": torch.zeros(0, 4), "odd": torch.ones(3, dtype=torch.uint8)}
    save_file(tensors, path, {"format": "pt"})
    specs, metadata = read_header(path)
    assert metadata == {"format": "pt"} and set(specs) == set(tensors)
    for name, expected in load_file(path).items():
        got = read_tensor(tmp_path, specs[name])
        assert got.shape == expected.shape and dtype_name(got.dtype) == specs[name].dtype
        assert got.reshape(-1).view(torch.uint8).equal(expected.contiguous().reshape(-1).view(torch.uint8)), name


def test_a_loaded_tensor_is_writable_and_alone(small):
    """A tensor that maps the file would change an input, or the next read."""
    specs, _ = read_header(small)
    read_tensor(small.parent, specs["a"]).zero_()
    assert read_tensor(small.parent, specs["a"]).sum() == 15


def test_truncated_at_every_length(small):
    """A file cut anywhere must be refused, not end in KeyError, JSONDecodeError or a silently short tensor."""
    whole = small.read_bytes()
    for length in range(len(whole)):
        small.write_bytes(whole[:length])
        assert "model.safetensors" in refusal(small)


def test_every_flipped_header_byte_is_refused_or_read(small):
    """A corrupt header may still be a valid one, but never another exception than Refused."""
    whole = small.read_bytes()
    for index in range(8 + struct.unpack("<Q", whole[:8])[0]):
        small.write_bytes(whole[:index] + bytes([whole[index] ^ 0x15]) + whole[index + 1 :])
        try:
            read_header(small)
        except Refused:
            pass


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3)
       | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "w", "F32", ""]), inner, max_size=4), max_leaves=12))
def test_any_json_header_is_refused_or_read(tmp_path, header):
    """Types that nobody expects (a bool as a size, a list as an entry) must not escape as TypeError."""
    path = write(tmp_path / "x.safetensors", header, b"1234")
    try:
        read_header(path)
    except Refused:
        pass


def test_duplicate_tensor_name(tmp_path):
    """json.loads keeps the last of two keys: one tensor would vanish (safetensors 0.8 accepts this file)."""
    text = '{"w":' + json.dumps(row(0, 4)) + ',"w":' + json.dumps(row(4, 8)) + "}"
    assert "'w' appears twice" in refusal(write(tmp_path / "x.safetensors", text.encode(), bytes(8)))


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": row(0, 4), "b": row(5, 8)}, 8, "leaves a hole"),
        ({"a": row(1, 4)}, 4, "leaves a hole"),
        ({"a": row(0, 4), "b": row(2, 8)}, 8, "overlaps"),
        ({"a": row(0, 4)}, 5, "goes on after"),
        ({}, 1, "goes on after"),
        ({"a": row(0, 4)}, 3, "ends inside a tensor"),
        ({"a": row(0, 4, "F32", [2])}, 4, "byte count disagree"),
        ({"a": row(0, 4, "F32", [2**62, 2**62])}, 4, "byte count disagree"),
        ({"a": row(0, 4, "F32", [-1, -1])}, 4, "malformed shape"),
        ({"a": row(0, 1, "U8", [True])}, 1, "malformed shape"),
        ({"a": row(0, 4, "F4")}, 4, "does not read"),
        ({"a": {"dtype": "U8", "shape": [4]}}, 4, "malformed"),
        ({"a": {"dtype": "U8", "shape": [0], "data_offsets": [4, 0]}}, 4, "malformed offsets"),
        ({"": row(0, 4)}, 4, "no usable name"),
        ({"a\x1b[2J": row(0, 4)}, 4, "no usable name"),
        ({"__metadata__": {"format": 1}}, 0, "metadata"),
        (b'{"a":NaN}', 0, "not JSON"),
        (b"[]", 0, "no safetensors header"),
        (b'{"a":' + b"[" * 200_000, 0, "JSON"),
        (b"{\xff}", 0, "JSON"),
    ],
)
def test_broken_layouts(tmp_path, header, data, says):
    """Each of these would read bytes that belong to another tensor, or to none."""
    assert says in refusal(write(tmp_path / "x.safetensors", header, bytes(data)))


def test_broken_tensor_is_named(tmp_path):
    """A message without the tensor leaves people searching a 700-tensor file."""
    assert "'model.norm.weight' in x.safetensors" in refusal(write(tmp_path / "x.safetensors", {"model.norm.weight": row(0, 4)}, b"1"))


def test_huge_header_is_not_allocated(tmp_path):
    """Eight bytes must not make the reader ask for 2^60 bytes of memory."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "header larger" in refusal(path)


def test_missing_file_and_folder(tmp_path):
    """A missing or special file is a refusal, not FileNotFoundError or IsADirectoryError."""
    assert "missing" in refusal(tmp_path / "x.safetensors")
    assert "cannot be read" in refusal(tmp_path)


def test_file_that_shrinks_after_opening(small):
    """With a memory map this is a SIGBUS; with a plain read it could be a short tensor."""
    specs, _ = read_header(small)
    small.write_bytes(small.read_bytes()[:-2])
    with pytest.raises(Refused, match="shorter"):
        read_tensor(small.parent, max(specs.values(), key=lambda spec: spec.start))
    small.unlink()
    with pytest.raises(Interrupted, match="cannot be read"):
        read_tensor(small.parent, specs["a"])


def test_dtype_without_a_spelling():
    """complex64 must not be written under some other name."""
    assert dtype_name(torch.bfloat16) == "BF16"
    with pytest.raises(Refused, match="cannot hold"):
        dtype_name(torch.complex64)


def test_half_a_character_is_refused(tmp_path):
    """safetensors refuses a header with a lone surrogate, and a name with one cannot be written out again (found by fuzzing: header-90aa0adb0b2b)."""
    path = tmp_path / "model.safetensors"
    raw = b'{"a\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0")
    with pytest.raises(Refused, match="half a character"):
        read_header(path)
