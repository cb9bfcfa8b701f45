"""Files of gathered tensors: what comes back, and notes that say something else."""

import base64
import hashlib
import json
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from surgery.artifact.tensorfiles import read_header, read_tensors
from surgery.disk.untrusted import UnreadableError
from surgery.errors import ArtifactError
from surgery.safetensors.gathered import DATA, INDEX_BYTES, NOTE, pays, spread, write_gathered

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float16)


def drawn(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 9).abs().to(dtype)


def note_of(entries: object) -> str:
    return base64.b85encode(zlib.compress(json.dumps(entries).encode())).decode()


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_gathered_tensors_come_back(kinds):
    import tempfile

    tensors = {f"a/b.{n}:ä": drawn(dtype, shape, n) for n, (dtype, shape) in enumerate(kinds)}
    tensors["last"] = torch.arange(3)
    with tempfile.TemporaryDirectory() as place:
        path, digest = Path(place) / "x.safetensors", hashlib.sha256()
        write_gathered(path, tensors, digest)
        found = read_tensors(path)
        assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
            assert found[name].data_ptr() % 64 == 0 or not tensor.numel() or tensor.element_size() == 1
        assert list(load_file(path)) == [DATA]  # an ordinary file


def test_the_digest_of_a_header_covers_the_names(tmp_path):
    one = {f"n{i}": torch.full((4,), float(i)) for i in range(30)}
    other = {f"n{29 - i}": t for i, t in enumerate(one.values())}
    write_gathered(tmp_path / "one.safetensors", one)
    write_gathered(tmp_path / "other.safetensors", {f"x{name}": t for name, t in other.items()})
    digests = {read_header(tmp_path / f"{name}.safetensors").digest for name in ("one", "other")}
    assert len(digests) == 2


def test_many_small_tensors_take_a_fraction_of_an_ordinary_file(tmp_path):
    small = {
        f"member{i}/layer.{j}.bias:z": torch.zeros(40, dtype=torch.uint8) for i in range(40) for j in range(5)
    }
    assert pays(small) and not pays(dict(list(small.items())[:5]))
    save_file(small, tmp_path / "plain.safetensors")
    write_gathered(tmp_path / "gathered.safetensors", small)
    plain, gathered = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("plain", "gathered"))
    assert gathered < 8000 + 1000 < plain / 2  # 8,000 bytes of tensors


@pytest.mark.parametrize(
    ("note", "said"),
    [
        ("~~~not base85 \x7f", "deflated list"),
        (base64.b85encode(b"not deflated").decode(), "deflated list"),
        (base64.b85encode(zlib.compress(b"[]")[:-3]).decode(), "whole list"),
        (base64.b85encode(zlib.compress(b"[]") + b"more").decode(), "whole list"),
        (base64.b85encode(zlib.compress(b" " * (INDEX_BYTES + 1))).decode(), "whole list"),
        (note_of({"a": 1}), "a list of its tensors"),
        (note_of([["a", "U8"]]), "a name, a dtype and a shape"),
        (note_of([["a", "U9", [8]]]), "a name, a dtype and a shape"),
        (note_of([["a", "U8", [-8]]]), "a name, a dtype and a shape"),
        (note_of([["a", ["U8"], [8]]]), "a name, a dtype and a shape"),
        (note_of([["a", "U8", [4]], ["a", "U8", [4]]]), "once and whole"),
        (note_of([["a", "U8", [9]]]), "once and whole"),
        (note_of([["a", "U8", [1 << 40, 1 << 40]]]), "once and whole"),
        (note_of([["a", "U8", [7]]]), "what all of its 8 bytes are"),
    ],
)
def test_a_note_that_does_not_describe_the_data_is_refused(note, said, tmp_path):
    data = torch.arange(8, dtype=torch.uint8)
    with pytest.raises(UnreadableError, match=said):
        spread(data, note)
    save_file({DATA: data}, tmp_path / "x.safetensors", {NOTE: note})
    with pytest.raises(ArtifactError, match=said):
        read_tensors(tmp_path / "x.safetensors")
