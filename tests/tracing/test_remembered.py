"""Calls that are remembered: whatever came before, a result is like the one that the call itself gives."""

import operator

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.tracing import remembered, trace
from surgery.tracing.remembered import call

UNARY = {
    "transpose": lambda f, x: f(torch.transpose, x, 0, -1),
    "reshape": lambda f, x: f(Tensor.reshape, x, -1, x.shape[0]),  # a view or a copy, by the strides
    "contiguous": lambda f, x: f(Tensor.contiguous, x),
    "float": lambda f, x: f(Tensor.to, x, torch.float32),
    "square": lambda f, x: f(torch.pow, x, 2),
    "square of reals": lambda f, x: f(torch.pow, x, 2.0),
    "half": lambda f, x: f(operator.truediv, x, 2) if f is run else f(Tensor.__truediv__, x, 2),
    "sum": lambda f, x: f(Tensor.sum, x, dim=-1, keepdim=True),
    "sums": lambda f, x: f(torch.sum, x, (0, 1)),
    "softmax": lambda f, x: f(F.softmax, x, -1, dtype=torch.float64),
    "norm": lambda f, x: f(F.layer_norm, x.float(), x.shape[-1:]),
    "linear": lambda f, x: f(F.linear, x.float(), meta(5, x.shape[-1])),
    "rows": lambda f, x: f(Tensor.__getitem__, x, meta(2, 3).long()),
    "every other": lambda f, x: f(Tensor.__getitem__, x, (slice(None, None, 2), slice(None))),
    "twice": lambda f, x: f(torch.cat, [x, x], dim=1),
    "rectified": lambda f, x: f(F.relu, x.float(), False),
    "with itself": lambda f, x: f(torch.mul, x, x.transpose(0, 1)) if x.shape[0] == x.shape[1] else x,
}


def run(func, *args, **kwargs):
    return func(*args, **kwargs)


def again(func, *args, **kwargs):
    call(func, args, kwargs)
    return call(func, args, kwargs)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def memory(tensor):
    return tensor.untyped_storage()._cdata


def as_seen(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.storage_offset()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 4]), min_size=2, max_size=4),
    st.permutations(range(4)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    st.sampled_from(sorted(UNARY)),
)
def test_a_remembered_call_gives_what_the_call_gives(shape, order, dtype, name):
    x = meta(*shape, dtype=dtype).permute([axis for axis in order if axis < len(shape)])
    with torch.no_grad():
        expected, found = UNARY[name](run, x), UNARY[name](again, x)
    assert as_seen(found) == as_seen(expected)
    assert (memory(found) == memory(x)) == (memory(expected) == memory(x))


def test_what_looks_alike_and_is_not():
    class Own(Tensor):
        pass

    own, x = meta(3, 4).as_subclass(Own), meta(3, 4)
    numbers, conjugated = meta(3, dtype=torch.int64), meta(3, dtype=torch.complex64)
    with torch.no_grad():
        assert again(torch.add, x, 1).dtype == torch.float32
        assert again(torch.add, numbers, True).dtype == torch.int64
        assert again(torch.add, numbers, 1.0).dtype == torch.float32
        assert again(torch.pow, numbers, 1).dtype == torch.int64
        assert type(again(torch.add, own, 1)) is Own
        inside = torch.vmap(lambda row: again(torch.mul, row, row))(meta(7, 3, 4))
        assert inside.shape == (7, 3, 4)
        assert memory(again(torch.resolve_conj, conjugated.conj())) != memory(conjugated)
        assert memory(again(torch.resolve_conj, conjugated)) == memory(conjugated)
        torch.set_default_dtype(torch.float64)
        try:
            assert again(torch.add, numbers, 1.0).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
        assert again(torch.add, torch.ones(2), 1).tolist() == [2, 2]
    weight = nn.Parameter(x)
    assert again(torch.mul, weight, 2).requires_grad and not again(torch.mul, x, 2).requires_grad


def test_several_new_tensors_are_remembered_and_views_of_one_are_not(monkeypatch):
    """As of an LSTM, whose call on the meta device takes a third of a second; a split shares memory with its tensor."""
    lstm = nn.LSTM(3, 4, batch_first=True).to("meta")
    state = (meta(1, 2, 4), meta(1, 2, 4))
    arguments = (meta(2, 5, 3), state, list(lstm.parameters()), True, 1, 0.0, False, False, True)
    remembered.forget()
    with torch.no_grad():
        direct = torch.lstm(*arguments)
        found = [call(torch.lstm, arguments, {}) for _ in range(2)]
        for result in found:
            assert type(result) is tuple
            assert [(t.shape, t.stride(), t.dtype) for t in result] == [
                (t.shape, t.stride(), t.dtype) for t in direct
            ]
        assert len({t.untyped_storage()._cdata for result in found for t in result}) == 6
        assert len(remembered._results) == 1
        x = meta(6, 2)
        for func, given in ((torch.split, (x, 2)), (torch.chunk, (x, 3)), (torch.unbind, (x,))):
            for _ in range(2):
                parts = call(func, given, {})
                assert {t.untyped_storage()._cdata for t in parts} == {x.untyped_storage()._cdata}
        assert len(remembered._results) == 1


def test_functions_that_are_not_pytorch_s_are_called():
    calls = []

    def shift(tensor):
        calls.append(tensor)
        return tensor + 1

    with torch.no_grad():
        again(shift, meta(2))
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "wav2vec2", "convnext_atto"])
def test_a_network_is_traced_the_same_from_what_was_remembered(name):
    member = zoo.member(name)
    remembered.forget()
    first = trace(member.module, member.inputs)
    made = len(remembered._results)
    second = trace(member.module, member.inputs)
    assert 0 < made == len(remembered._results)
    assert second.uses == first.uses and second.graph is not None and first.graph is not None

    def written(graph):
        return [
            (n.name, n.target, str(n.args), str(n.kwargs), {k: str(v) for k, v in n.meta.items()})
            for n in graph.nodes
        ]

    assert written(second.graph) == written(first.graph)


def test_memory_for_calls_has_a_bound(monkeypatch):
    monkeypatch.setattr(remembered, "MOST", 3)
    remembered.forget()
    with torch.no_grad():
        for size in range(1, 12):
            assert again(torch.mul, meta(size), 2).shape == (size,)
            assert len(remembered._results) <= 3
