"""Inflating ahead: the same tensors and errors as decoding, in any order, within bounds."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.errors import ArtifactError
from surgery.storage import ahead
from surgery.storage.ahead import Ahead
from surgery.storage.codecs import Encoded, Huffman, Precision, decode, encode, encode_native, packed

FORMS = ("int4/64", "int5/64", "int8/64", "bfloat16", "native")


def some(count, rows=8):
    generator = torch.Generator().manual_seed(count)
    found = []
    for index in range(count):
        tensor = torch.randn(rows, 256, generator=generator)
        form = FORMS[index % len(FORMS)]
        found.append(
            encode_native(tensor) if form == "native" else packed(encode(tensor, Precision.parse(form)))
        )
    assert count < 4 or any(each.precision.name == Huffman.name for each in found)
    return found


def damaged():
    """Codes that begin as Deflate does, and end too soon."""
    whole = packed(encode(torch.randn(64, 256), Precision.parse("int4/64")))
    part = whole.parts["z"].clone()
    part[40:80] = 255
    return Encoded(whole.precision, whole.shape, whole.dtype, {"z": part})


@given(st.data())
def test_any_order_gives_what_decoding_gives(data):
    tensors = some(data.draw(st.integers(0, 12)))
    order = data.draw(st.lists(st.sampled_from(range(len(tensors))), max_size=20)) if tensors else []
    window = data.draw(st.sampled_from((0, 3000, 1 << 20)))
    before = ahead.WINDOW
    ahead.WINDOW = window
    try:
        with Ahead(tensors, threads=data.draw(st.integers(0, 3))) as reader:
            for index in order:
                assert torch.equal(reader.decode(tensors[index]), decode(tensors[index]))
    finally:
        ahead.WINDOW = before


def test_no_more_is_inflated_than_the_window_allows(monkeypatch):
    tensors = [packed(encode(torch.randn(64, 256), Precision.parse("int4/64"))) for _ in range(20)]
    one = Huffman.inflated_bytes(tensors[0])
    monkeypatch.setattr(ahead, "WINDOW", 3 * one)
    asked, begun, most = 0, 0, []
    inflate = Huffman.inflate

    def counted(encoded):
        nonlocal begun
        begun += 1
        most.append(begun - asked)
        return inflate(encoded)

    monkeypatch.setattr(Huffman, "inflate", staticmethod(counted))
    with Ahead(tensors, threads=2) as reader:
        for each in tensors:
            reader.decode(each)
            asked += 1
    assert begun == 20
    assert max(most) <= 3 + 1  # the one that is asked for counts until it is decoded


def test_a_damaged_tensor_raises_where_it_is_asked_for_and_no_thread_stays():
    bad, good = damaged(), some(10)
    with (
        pytest.raises(ArtifactError, match="copy the artifact again"),
        Ahead([*good, bad, *good], threads=2) as reader,
    ):
        reader.decode(good[0])
        reader.decode(bad)
    assert not [each for each in threading.enumerate() if each.name.startswith("surgery-inflate")]


def test_a_load_uses_it_and_gives_the_same_weights(tmp_path, monkeypatch):
    net = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 256))
    joint = surgery.join([surgery.load_member(net, name="net", inputs=torch.randn(1, 256))])
    surgery.fit(joint, max_error=0.1, seed=0)
    surgery.save(joint, tmp_path / "joint")
    seen = []
    inflate = Huffman.inflate

    def noted(encoded):
        seen.append(threading.current_thread().name)
        return inflate(encoded)

    def loaded():
        fresh = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 256))
        return surgery.load(tmp_path / "joint", modules={"net": fresh})["net"].state_dict()

    monkeypatch.setattr(Huffman, "inflate", staticmethod(noted))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    alone = loaded()
    assert seen and set(seen) == {"MainThread"}  # too few bytes for threads
    seen.clear()
    monkeypatch.setattr(ahead, "_WORTH", 1)
    together = loaded()
    assert seen and all(name.startswith("surgery-inflate") for name in seen)
    assert all(torch.equal(alone[name], together[name]) for name in alone)
