"""Every layer kind: the matrices of the canonical view, put to work one by one, give what the layer gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from surgery.members.member import Inputs
from surgery.tracing import TABLE, TIERS, trace

X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


class Apply(nn.Module):
    """A module that applies a function to its parameter `w` and others."""

    def __init__(self, function, *shape, **others):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.randn(*shape, generator=generator))
        for name, size in others.items():
            setattr(self, name, nn.Parameter(torch.randn(*size, generator=generator)))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def view_of(module, x=X, name="w", tiers=None):
    found = [use for use in trace(module, Inputs(args=(x,)), tiers).uses if use.parameter == name]
    assert found, f"no use of {name}"
    return found[0].view, found


MATRICES = {
    "transposed": (lambda s, x: x @ s.w.T, (7, 12), "o i -> 1 o i"),
    "left": (lambda s, x: torch.matmul(s.w, x.transpose(1, 2)), (7, 12), "o i -> 1 o i"),
    "right": (lambda s, x: x @ s.w, (12, 7), "i o -> 1 o i"),
    "addmm": (lambda s, x: torch.addmm(x.new_zeros(7), x[0], s.w), (12, 7), "i o -> 1 o i"),
    "bmm": (lambda s, x: torch.bmm(x, s.w), (2, 12, 6), "s i o -> s o i"),
    "bmm of a transposed": (lambda s, x: torch.bmm(x, s.w.mT), (2, 6, 12), "s o i -> s o i"),
    "expanded": (lambda s, x: torch.bmm(x, s.w[None].expand(2, -1, -1)), (12, 6), "i o -> 1 o i"),
    "selected": (lambda s, x: x @ s.w[0] + x @ s.w[2], (3, 12, 6), "s i o -> s o i"),
    "einsum": (lambda s, x: torch.einsum("bnd,de->bne", x, s.w), (12, 4), "i o -> 1 o i"),
    "einsum, ellipsis": (lambda s, x: torch.einsum("...d,de->...e", x, s.w), (12, 4), "i o -> 1 o i"),
    "einsum, implicit": (lambda s, x: torch.einsum("bnd,de", x, s.w), (12, 4), "i o -> 1 o i"),
    "heads out": (
        lambda s, x: torch.einsum("bnd,hed->bnhe", x, s.w.view(3, 4, 12)),
        (12, 12),
        "o i -> 1 o i",
    ),
    "heads in": (
        lambda s, x: torch.einsum("bnhe,hed->bnd", x.view(2, 5, 3, 4), s.w.view(3, 4, 12)),
        (12, 12),
        "i o -> 1 o i",
    ),
    "heads apart": (
        lambda s, x: torch.einsum("bnhe,hef->bnhf", x.view(2, 5, 3, 4), s.w.view(3, 4, 12)),
        (12, 12),
        "(s i) o -> s o i",
    ),
    "tensordot": (
        lambda s, x: torch.tensordot(x, s.w, dims=([2], [0])),
        (12, 3, 4),
        "i o1 o2 -> 1 (o1 o2) i",
    ),
    "chunks": (lambda s, x: sum(F.linear(x, w) for w in s.w.chunk(3)), (12, 12), "(s o) i -> s o i"),
    "chunks in": (
        lambda s, x: F.linear(x[..., :6], s.w[:, :6]) + F.linear(x[..., 6:], s.w[:, 6:]),
        (9, 12),
        "o (s i) -> s o i",
    ),
    "every other row": (lambda s, x: F.linear(x, s.w[::2]), (10, 12), "(o s) i -> s o i"),
    "uneven slice": (lambda s, x: F.linear(x, s.w[:8]), (12, 12), "o i -> 1 o i"),
    "permuted copy": (
        lambda s, x: F.linear(x, s.w.permute(2, 0, 1).reshape(8, 12)),
        (4, 3, 8),
        "i1 i2 o -> 1 o (i1 i2)",
    ),
    "cast": (lambda s, x: F.linear(x.bfloat16(), s.w.to(torch.bfloat16)), (7, 12), "o i -> 1 o i"),
    "exponential": (lambda s, x: F.linear(x, -torch.exp(s.w.float())), (7, 12), "o i -> 1 o i"),
    "standardised": (
        lambda s, x: F.linear(x, (s.w - s.w.mean(1, keepdim=True)) / s.w.std(1, keepdim=True)),
        (7, 12),
        "o i -> 1 o i",
    ),
    "flat convolution": (
        lambda s, x: F.conv1d(x.mT, s.w.view(6, 4, 3), groups=3),
        (6, 12),
        "(g o) (i w) -> (g w) o i",
    ),
    "one output": (lambda s, x: F.linear(x, s.w), (1, 12), "o i -> 1 o i"),
    "joined": (lambda s, x: F.linear(x, torch.cat([s.w, s.w])), (7, 12), "o i -> 1 o i"),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("tier", [TIERS[0], TIERS[2]], ids=["recorded", "exported"])
def test_axes_follow_the_way_from_parameter_to_weight(name, tier):
    function, shape, pattern = MATRICES[name]
    view, _ = view_of(Apply(function, *shape), tiers=[tier])
    assert view is not None and view.pattern == pattern


def test_matrices_of_heads_are_the_maps_of_the_heads():
    module = Apply(MATRICES["heads apart"][0], 12, 12)
    view, _ = view_of(module)
    heads = [X.view(2, 5, 3, 4)[:, :, k] @ w.T for k, w in enumerate(view.to_matrices(module.w))]
    assert torch.allclose(torch.stack(heads, 2), module(X), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_the_sum_of_its_matrices(rank, groups):
    layer = getattr(nn, f"Conv{rank}d")(4, 6, 3, groups=groups, bias=False)
    x = torch.randn(2, 4, *[5] * rank)
    view, _ = view_of(layer, x, "weight")
    windows = x
    for axis in range(rank):
        windows = windows.unfold(2 + axis, 3, 1)
    windows = windows.flatten(2 + rank).unflatten(1, (groups, 4 // groups))  # [B, g, i, ..., kernel]
    matrices = view.to_matrices(layer.weight).unflatten(0, (groups, 3**rank))
    expected = torch.einsum("bgi...k,gkoi->bgo...", windows, matrices).flatten(1, 2)
    assert torch.allclose(expected, layer(x), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_is_made_of_its_matrices(rank, groups):
    layer = getattr(nn, f"ConvTranspose{rank}d")(4, 6, 2, stride=2, groups=groups, bias=False)
    x = torch.randn(2, 4, *[3] * rank)
    view, _ = view_of(layer, x, "weight")
    matrices = view.to_matrices(layer.weight).unflatten(0, (groups, 2**rank))
    parts = torch.einsum("bgin,gkoi->bgokn", x.flatten(2).unflatten(1, (groups, 4 // groups)), matrices)
    parts = parts.flatten(1, 2)  # [B, out, kernel position, input position]
    expected = layer(x)
    for k in range(2**rank):
        place = [(k >> (rank - 1 - axis)) & 1 for axis in range(rank)]
        spots = expected[(..., *(slice(p, None, 2) for p in place))]
        assert torch.allclose(spots.flatten(2), parts[:, :, k], atol=1e-5)


@pytest.mark.parametrize("kind, gates", [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_networks_split_into_gates(kind, gates):
    options = {"proj_size": 2} if kind == "LSTM" else {}
    layer = getattr(nn, kind)(12, 6, 2, bidirectional=True, batch_first=True, **options)
    found = trace(layer, Inputs(args=(X,)))
    assert found.tier == TIERS[0].name
    views = {use.parameter: use.view for use in found.uses if use.role == "map"}
    assert set(views) == {name for name, p in layer.named_parameters() if p.dim() == 2}
    for name, view in views.items():
        assert view.shape[0] == (1 if "weight_hr" in name else gates)
    ends = {use.parameter for use in found.uses if use.first}
    assert ends == {"weight_ih_l0", "weight_ih_l0_reverse"}
    table = trace(layer, Inputs()).uses
    assert {use.parameter: use.view for use in table if use.role == "map"} == views


def test_packed_sequences_and_cells():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.cell = nn.LSTM(12, 6, batch_first=True, bias=False), nn.GRUCell(6, 4)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
            return self.cell(self.rnn(packed)[1][0][0])

    patterns = {
        use.parameter: use.view.pattern for use in trace(Packed(), Inputs(args=(X,))).uses if use.view
    }
    assert set(patterns.values()) == {"(gate o) i -> gate o i"} and len(patterns) == 4


@pytest.mark.parametrize("tier", range(3))
def test_attention_projections(tier):
    module = nn.Sequential(nn.TransformerEncoderLayer(12, 3, 16, batch_first=True), nn.Linear(12, 3))
    uses = {use.parameter: use for use in trace(module, Inputs(args=(X,)), TIERS[tier : tier + 1]).uses}
    assert uses["0.self_attn.in_proj_weight"].view.pattern == "(three o) i -> three o i"
    assert uses["0.self_attn.out_proj.weight"].view.pattern == "o i -> 1 o i"
    assert uses["0.self_attn.in_proj_bias"].kind == "bias"
    assert uses["0.self_attn.in_proj_weight"].first and not uses["0.self_attn.out_proj.weight"].first


def test_separate_attention_projections():
    module = nn.MultiheadAttention(12, 3, kdim=6, vdim=6, batch_first=True)
    found = trace(module, Inputs(args=(X, X[..., :6], X[..., :6])))
    maps = {use.parameter for use in found.uses if use.view is not None}
    assert maps == {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, nn.utils.weight_norm, parametrizations.spectral_norm]
)
@pytest.mark.filterwarnings("ignore")
def test_reparametrised_weights_keep_their_axes(wrap):
    layer = wrap(nn.Linear(12, 7)).eval()
    found = trace(layer, Inputs(args=(X,)))
    maps = {use.parameter for use in found.uses if use.view is not None}
    assert len(maps) == 1 and dict(layer.named_parameters())[maps.pop()].shape == (7, 12)
    scales = [use for use in found.uses if use.parameter.endswith(("original0", "weight_g"))]
    assert all(use.kind == "norm" and use.view is None for use in scales)
    table = [use.parameter for use in trace(layer, Inputs()).uses if use.view is not None]
    assert table == [use.parameter for use in found.uses if use.view is not None][-1:]


PRIVATE = {
    "scale": (lambda s, x: x * s.w, (12,), "norm"),
    "scale of rank 2": (lambda s, x: x * s.w, (5, 12), "norm"),
    "added": (lambda s, x: x + s.w, (5, 12), "bias"),
    "token": (lambda s, x: torch.cat([s.w.expand(2, -1, -1), x], 1), (1, 1, 12), "input"),
    "lookup": (lambda s, x: s.w[(x[..., 0] > 0).long()], (2, 12), "embedding"),
    "norm": (lambda s, x: F.layer_norm(x, (12,), s.w), (12,), "norm"),
    "vector product": (lambda s, x: x @ s.w, (12,), "norm"),
    "depthwise": (lambda s, x: F.conv1d(x.mT, s.w, groups=12), (12, 1, 3), "depthwise"),
    "bias table": (lambda s, x: x + s.w[torch.arange(5) % 2], (2, 12), "bias"),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_private_kinds_say_what_they_are(name):
    function, shape, kind = PRIVATE[name]
    _, uses = view_of(Apply(function, *shape))
    assert {(use.role, use.kind) for use in uses} == {("private", kind)}
    assert all(use.reason for use in uses)


@pytest.mark.parametrize(
    "function, shape",
    [
        (lambda s, x: F.linear(x, s.w.permute(0, 2, 1).reshape(32, 3).T.reshape(8, 12)), (4, 3, 8)),
        (lambda s, x: torch.einsum("...d,...ef->...f", x, s.w.expand(2, 5, 12, 4)), (12, 4)),
    ],
)
def test_what_no_pattern_can_say_has_a_reason(function, shape):
    view, uses = view_of(Apply(function, *shape))
    assert view is None and uses[0].role == "unclear" and uses[0].reason


def test_low_rank_factors_are_maps_and_hide_no_first_map():
    module = Apply(lambda s, x: F.linear(x, s.w + s.b @ s.a), 7, 12, a=(3, 12), b=(7, 3))
    uses = {use.parameter: use for use in trace(module, Inputs(args=(X,))).uses}
    assert uses["a"].view.pattern == "i o -> 1 o i" and uses["b"].view.pattern == "o i -> 1 o i"
    assert uses["w"].first and not uses["a"].first


def test_module_types_alone():
    module = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "up": nn.ConvTranspose1d(4, 6, 2),
            "embedding": nn.Embedding(5, 3),
            "norm": nn.LayerNorm(3),
            "attention": nn.MultiheadAttention(6, 2),
        }
    )
    found = trace(module, Inputs())
    assert found.tier == TABLE and found.graph is None and not found.ordered
    kinds = {use.parameter: (use.role, use.kind) for use in found.uses}
    assert set(kinds) == set(module.state_dict())
    assert kinds["conv.weight"] == ("map", "conv2d") and kinds["depthwise.weight"] == ("private", "depthwise")
    assert kinds["up.weight"] == ("map", "conv_transpose1d") and kinds["embedding.weight"][1] == "embedding"
    assert kinds["norm.bias"] == ("private", "norm") and kinds["attention.in_proj_weight"][0] == "map"
