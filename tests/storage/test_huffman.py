"""Huffman-coded tensors: the same values in fewer bytes, and bytes of others never more than an error."""

import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.errors import ArtifactError
from surgery.storage.codecs import (
    BFLOAT16,
    Encoded,
    Precision,
    by_row,
    decode,
    encode,
    expected_bytes,
    grouped,
    packed,
    take_rows,
    unpacked,
)
from surgery.storage.codecs.huffman import PART, Huffman, _varint
from surgery.storage.codecs.planes import unpack

BITS = (2, 3, 4, 5, 6, 7, 8, 10, 12)
CODER = Huffman()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def coded(whole):
    """Coded whether or not that pays."""
    return Encoded(Precision("huffman", whole.precision), whole.shape, whole.dtype, CODER._pack(whole))


@st.composite
def stored(draw):
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 70))
    tensor = normal(
        rows,
        columns,
        seed=draw(st.integers(0, 99)),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))),
    )
    tensor = tensor * draw(st.sampled_from((0.0, 1e-3, 1.0))) + draw(st.sampled_from((0.0, 5.0)))
    group, kind = draw(st.sampled_from((8, 64))), draw(st.sampled_from(("bfloat16", "int", "mixed")))
    if kind == "bfloat16":
        return encode(tensor, BFLOAT16)
    if kind == "int" or rows == 1:
        return encode(tensor, grouped(draw(st.sampled_from(BITS)), group))
    few = draw(st.integers(1, rows - 1))
    return encode(
        tensor,
        by_row(
            group, [(draw(st.sampled_from(BITS[4:])), few), (draw(st.sampled_from(BITS[:4])), rows - few)]
        ),
    )


@given(stored(), st.data())
def test_coding_changes_no_bit(whole, data):
    made = coded(whole)
    assert torch.equal(decode(made), decode(whole)) and decode(made).dtype == whole.dtype
    back = unpacked(made)
    assert back.precision == whole.precision and list(back.parts) == list(whole.parts)
    assert all(torch.equal(back.parts[name], part) for name, part in whole.parts.items())
    assert packed(whole).nbytes <= whole.nbytes + 64 * (len(whole.parts) - 1)
    assert Precision.parse(str(made.precision)) == made.precision and made.precision.shown == str(
        whole.precision
    )
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(decode(whole)) - 1), min_size=1, max_size=5)))
    taken = take_rows(made, rows)
    assert taken.precision.settings == take_rows(whole, rows).precision
    assert torch.equal(decode(taken), decode(whole)[rows])


@given(stored(), st.data())
def test_foreign_bytes_give_a_tensor_or_an_error(whole, data):
    made = coded(whole)
    content = bytearray(made.parts[PART].numpy().tobytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(1, len(content)))]
    parts = {PART: torch.frombuffer(content, dtype=torch.uint8)}
    foreign = Encoded(made.precision, made.shape, made.dtype, parts)
    if made.precision.codec.fault(parts):
        with pytest.raises(ArtifactError, match="copy the artifact again"):
            decode(foreign)
        return
    try:
        assert decode(foreign).shape == made.shape
    except ArtifactError as error:
        assert "must decode" in str(error)
    except IndexError:
        assert "mixed" in str(
            made.precision
        )  # rows of other classes than it has, which `fault` finds of what is read


def test_a_stream_is_read_no_further_than_it_should_be():
    whole = encode(normal(4, 64), grouped(8, 64))
    bomb = zlib.compress(bytes(1 << 26), 9)[2:-4]
    content = bytearray([3]) + bytearray([*_varint(2 * len(bomb)), 0, 0]) + bytearray(bomb)
    foreign = Encoded(Precision("huffman", whole.precision), whole.shape, whole.dtype,
                      {PART: torch.frombuffer(content, dtype=torch.uint8)})  # fmt: skip
    with pytest.raises(ArtifactError, match="a stream of other than 256 bytes"):
        decode(foreign)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_coding_comes_close_to_the_entropy(bits):
    whole = encode(normal(256, 1024), grouped(bits, 64))
    codes = unpack(whole.parts, bits, 256 * 1024)
    share = torch.bincount(codes.long()).double() / codes.numel()
    entropy = -float((share[share > 0] * share[share > 0].log2()).sum()) * codes.numel() / 8
    scales = whole.parts["scale"].nbytes
    assert packed(whole).nbytes < 1.015 * entropy + scales
    assert packed(whole).nbytes == pytest.approx(
        expected_bytes((256, 1024), torch.float32, whole.precision), rel=0.01
    )


def test_what_has_no_streams_is_refused():
    with pytest.raises(ValueError, match="'huffman:native' is not a precision"):
        Precision.parse("huffman:native")
    with pytest.raises(ValueError, match="not a precision"):
        Precision.parse("huffman:huffman:int4/64")


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))


def test_an_artifact_holds_coded_tensors_and_damage_is_named(tmp_path):
    joint = surgery.join([surgery.load_member(net(), name="net", inputs=normal(2, 64))])
    joint = surgery.fit(joint, max_error=0.1)
    expected = joint.collapse("net")
    folder = surgery.save(joint, tmp_path / "joint")
    loaded = surgery.load(folder, modules={"net": net()})
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.collapse("net").items())
    assert "huffman:int" in (folder / "manifest.json").read_text()
    assert "huffman" not in (folder / "README.md").read_text()
    file = folder / "members" / "net" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = b"\xff" * (len(content) - start)
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"holds 0\.weight with lengths of streams that do not end"):
        surgery.load(folder, modules={"net": net()})


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_what_nothing_has_trained_takes_next_to_nothing(value):
    whole = encode(torch.full((256,), value), grouped(8, 64))
    assert packed(whole).nbytes < 20
    assert decode(packed(whole)).equal(decode(whole))
