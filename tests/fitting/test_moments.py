"""Moments of sites' inputs: tr(E H E^T) is the squared change of what a lone map puts out, for every kind of map."""

from __future__ import annotations

import pytest
import torch
from artifacts import member
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from surgery.anatomy.sites import discover
from surgery.fitting.moments import average, gather, patches


def found(body, *batches):
    """Sites of a module, all maps among them, and the moments of their inputs."""
    maps = [name for name, each in body.named_parameters() if each.ndim > 1]
    anatomy = discover(member(body, "one", *batches[0]), sites=maps)
    return {s.name: s for s in anatomy.sites}, gather(body, anatomy.sites, [(b, {}) for b in batches])


def check(body, name, *batches):
    """The price of a random error is the squared change of the outputs."""
    body = body.eval()
    _, moments = found(body, *batches)
    weight = body.get_parameter(name)
    with torch.no_grad():
        before = [body(*b) for b in batches]
        error = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        weight += error
        after = [body(*b) for b in batches]
    moved = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(after, before, strict=True))
    assert moments[name].price(error) == pytest.approx(moved, rel=1e-4)
    return moments[name]


@given(seed=st.integers(0, 99), out=st.integers(1, 5), into=st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_a_linear_map(seed, out, into):
    torch.manual_seed(seed)
    moments = check(nn.Linear(into, out), "weight", (torch.randn(3, 2, into),), (torch.randn(4, into),))
    assert moments.count == 10 and moments.statistics.second_moment.shape == (into, into)


@given(
    seed=st.integers(0, 99), rank=st.integers(1, 3), groups=st.integers(1, 2), kernel=st.integers(1, 3),
    stride=st.integers(1, 3), padding=st.sampled_from([0, 1, 2, "same"]), dilation=st.integers(1, 2),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_a_convolution_is_the_map_of_its_unfolded_patches(
    seed, rank, groups, kernel, stride, padding, dilation
):
    torch.manual_seed(seed)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    stride = 1 if padding == "same" else stride
    body = kind(2 * groups, 4 * groups, kernel, stride, padding, dilation, groups)
    moments = check(body, "weight", (torch.randn(2, 2 * groups, *(range(6, 6 + rank))),))
    assert moments.total.shape == (groups, 2 * kernel**rank, 2 * kernel**rank)
    assert (moments.statistics is None) == (groups > 1)


def test_patches_are_those_of_unfold():
    x = torch.randn(3, 7, 8)
    ours = patches(x, (2, 3), (2, 1), (1, 2), (2, 1))
    theirs = torch.nn.functional.unfold(x[None], (2, 3), dilation=(2, 1), padding=(1, 2), stride=(2, 1))
    torch.testing.assert_close(ours[0], theirs[0].T)


class Right(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return torch.addmm(torch.zeros(3), x, self.weight)


class Left(Right):
    def forward(self, x):
        return self.weight @ x[..., :3].T


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x):
        if x.ndim == 2:
            return torch.bmm(x.expand(2, -1, -1), self.weight)
        return torch.einsum("sbi,sio->sbo", x, self.weight)


@pytest.mark.parametrize("kind", [Right, Left])
def test_moments_of_a_product_are_those_of_its_other_factor(kind):
    torch.manual_seed(0)
    check(kind(), "weight", (torch.randn(5, 4),))


def test_stacks_of_maps_have_moments_each():
    torch.manual_seed(0)
    check(Experts(), "weight", (torch.randn(5, 4),))
    assert check(Experts(), "weight", (torch.randn(2, 5, 4),)).total.shape == (2, 4, 4)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("first", [True, False])
def test_recurrent_networks_see_inputs_and_states_of_every_layer_and_direction(kind, first):
    torch.manual_seed(0)
    body = kind(3, 5, num_layers=2, bidirectional=True, batch_first=first)
    x = torch.randn(4, 6, 3)
    _, moments = found(body, (x,))
    sites = [name for name, _ in body.named_parameters() if "weight" in name]
    assert sorted(moments) == sorted(sites)
    with torch.no_grad():
        states = body(x)[0]
    total = moments["weight_hh_l1"].total[0]
    forward = states[..., :5] if not first else states[..., :5].transpose(0, 1)
    before = forward[:-1].reshape(-1, 5)  # the first state is zero
    torch.testing.assert_close(total, before.T @ before, rtol=1e-4, atol=1e-5)
    assert moments["weight_ih_l1"].total.shape == (1, 10, 10)


def test_attention_projections_see_what_they_project():
    torch.manual_seed(0)
    body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    _, moments = found(body, (x,))
    assert {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"} <= set(moments)
    flat = x.reshape(-1, 8)
    torch.testing.assert_close(moments["self_attn.in_proj_weight"].total[0], flat.T @ flat)
    assert moments["self_attn.in_proj_weight"].count == 6


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


def test_the_output_projection_of_attention_is_priced_exactly():
    torch.manual_seed(0)
    check(Attention(), "inner.out_proj.weight", (torch.randn(2, 3, 8),))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x):
        return torch.cat([self.one(x), self.two(2 * x)])


def test_a_tied_weight_sees_the_inputs_of_all_its_uses():
    torch.manual_seed(0)
    check(Tied(), "one.weight", (torch.randn(5, 4),))


class Lost(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.one(x) + x @ (self.two.weight * 2).T


def test_uses_that_are_not_followed_leave_a_site_out():
    _, moments = found(Lost(), (torch.randn(5, 4),))
    assert "one.weight" in moments and "two.weight" not in moments


def test_members_count_the_same_in_an_average():
    torch.manual_seed(0)
    body = nn.Linear(3, 2)
    few, many = (found(body, (torch.randn(n, 3),))[1]["weight"] for n in (4, 400))
    both = average([few, many])
    torch.testing.assert_close(both.total / both.count, (few.total / 4 + many.total / 400) / 2)
    with pytest.raises(ValueError, match="one view"):
        average([few, found(nn.Linear(2, 3), (torch.randn(4, 2),))[1]["weight"]])


def test_the_random_state_and_the_module_are_left_as_they_were():
    body = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).eval()
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in body.state_dict().items()}
    found(body, (torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items())
