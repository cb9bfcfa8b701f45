"""Sites: every tensor is accounted for once, and selectors mean what they say."""

import pytest
import torch
from torch import nn
from zoo import NETWORKS, member, minilm

from surgery.anatomy.sites import discover
from surgery.errors import PlanError
from surgery.geometry.blocks import BlockGrid
from surgery.members.member import Inputs, Member, Origin, owners_of

X = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))


def live(module, *args):
    return Member("m", module.eval(), Inputs(args=args), Origin("module", "m", type(module).__name__))


def chain(width=12, depth=4):
    return live(nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))), X)


def names(parts):
    return [part.name for part in parts]


def alone(anatomy, name):
    (found,) = [part for part in anatomy.left_alone if part.name == name]
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_is_a_site_or_left_alone_once(name):
    network = member(name)
    anatomy = discover(network)
    owners = owners_of(network.module)
    state = network.module.state_dict()
    assert sorted(names(anatomy.sites) + names(anatomy.left_alone)) == sorted(owners)
    for part in (*anatomy.sites, *anatomy.left_alone):
        assert part.owners == owners[part.name] and part.member == name
        assert part.shape == tuple(state[part.name].shape) and f"torch.{part.dtype}" == str(
            state[part.name].dtype
        )
    for part in anatomy.left_alone:
        assert part.reason and part.role in ("private", "skipped")
        assert part.role == "private" or part.kind == "buffer", part
    for site in anatomy.sites:
        matrices = site.view.to_matrices(state[site.name])
        assert tuple(matrices.shape) == site.view.shape and min(site.shape[:2]) > 1
        assert torch.equal(site.view.to_tensor(matrices), state[site.name])
    assert [site.order for site in anatomy.sites] == sorted({site.order for site in anatomy.sites})


# Sites that are known from the architectures: every matrix but embeddings, first and last map.
@pytest.mark.parametrize(
    "name, count",
    [
        ("bert", 12),
        ("albert", 7),
        ("gpt2", 8),
        ("t5", 2 * 6 + 2 * 10),
        ("llama", 14),
        ("mixtral", 2 * (4 + 1 + 2)),
        ("mamba", 2 * 4),
        ("vit_tiny_patch16_224", 48),
        ("resnet18", 19),
        ("tf_efficientnet_lite0", 32),
        ("mixer_s32_224", 8 * 4),
    ],
)
def test_counts_of_sites(name, count):
    assert len(discover(member(name)).sites) == count


def test_minilm_has_its_36_encoder_matrices():
    anatomy = discover(minilm())
    assert len(anatomy.sites) == 36 and all(".layer." in site.name for site in anatomy.sites)
    assert sum(BlockGrid(*site.view.shape, 16, 16).locations for site in anatomy.sites) == 41_472
    assert alone(anatomy, "pooler.dense.weight").kind == "last"
    assert alone(anatomy, "embeddings.word_embeddings.weight").kind == "embedding"


def test_experts_are_stacks():
    sites = {site.name: site for site in discover(member("mixtral")).sites}
    assert sites["model.layers.0.mlp.experts.gate_up_proj"].view.shape == (4, 128, 32)
    assert sites["model.layers.1.mlp.experts.down_proj"].view.shape == (4, 32, 64)


def test_a_tied_embedding_is_one_private_tensor_with_two_owners():
    anatomy = discover(member("gpt2"))
    tied = alone(anatomy, "transformer.wte.weight")
    assert tied.owners == ("transformer.wte.weight", "lm_head.weight") and tied.kind == "embedding"
    forced = discover(member("gpt2"), sites=["lm_head.weight"])
    (site,) = [site for site in forced.sites if site.name == "transformer.wte.weight"]
    assert site.view.pattern == "v d -> 1 d v" and site.view.shape == (1, 32, 100)


def test_first_and_last_maps():
    anatomy = discover(chain())
    assert names(anatomy.sites) == ["1.weight", "2.weight"]
    assert (alone(anatomy, "0.weight").kind, alone(anatomy, "3.weight").kind) == ("first", "last")
    network = chain()
    unordered = discover(Member("m", network.module, Inputs(), network.origin))
    assert names(unordered.sites) == names(anatomy.sites) and "no execution order" in unordered.notes[-1]


def test_selectors_make_sites_private_and_skipped_tensors():
    anatomy = discover(chain(), private=["1.weight"], sites=["re:[03].weight"], skip=["re:2\\..*"])
    assert names(anatomy.sites) == ["0.weight", "3.weight"]
    assert alone(anatomy, "1.weight").reason == "private by request"
    assert alone(anatomy, "2.weight").reason == alone(anatomy, "2.bias").reason == "skipped by request"
    assert alone(anatomy, "2.weight").role == "skipped"


def test_a_depthwise_convolution_can_be_a_site():
    module = nn.Sequential(nn.Conv1d(3, 6, 3), nn.Conv1d(6, 6, 3, groups=6), nn.Conv1d(6, 2, 3))
    network = live(module, torch.randn(1, 3, 20))
    assert alone(discover(network), "1.weight").kind == "depthwise"
    (site,) = discover(network, sites=["1.weight"]).sites
    assert site.view.shape == (18, 1, 1)


def test_all_bad_selectors_in_one_error():
    with pytest.raises(PlanError) as caught:
        discover(chain(), private=["1.wieght"], sites=["0.bias"], skip=["re:nothing.*"])
    message = str(caught.value)
    assert (
        "'1.wieght' matches none (close: 1.weight, " in message and "'re:nothing.*' matches none" in message
    )
    assert message.startswith("Every `private` and `sites` and `skip` must match a tensor of a member")
    assert "'0.bias' has no view as a linear map (is added to its input)" in message
    with pytest.raises(PlanError, match=r"'re:\(' is no regular expression"):
        discover(chain(), sites=["re:("])


def test_buffers_and_what_no_one_uses():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
            self.spare = nn.Parameter(torch.ones(3, 4))
            self.never = nn.Linear(5, 6)
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
            self.register_buffer("table", torch.zeros(4, 4))

        def forward(self, x):
            return self.c(self.b(self.a(x))) + self.table.sum()

    anatomy = discover(live(Odd(), X))
    assert names(anatomy.sites) == ["b.weight", "never.weight"]
    assert {alone(anatomy, name).kind for name in ("steps", "table")} == {"buffer"}
    assert (alone(anatomy, "spare").role, alone(anatomy, "spare").kind) == ("skipped", "unused")


def test_a_shared_layer_is_one_site():
    shared = nn.Linear(12, 12)
    anatomy = discover(live(nn.Sequential(nn.Linear(12, 12), shared, shared, nn.Linear(12, 2)), X))
    (site,) = anatomy.sites
    assert site.owners == ("1.weight", "2.weight")
