"""Small networks for the laws of joint models: real architectures, and modules with every trap for slots."""

import copy

import torch
import zoo
from torch import Tensor, nn

from surgery.core.joining import join
from surgery.inputs.probes import tensors_in
from surgery.members.member import Inputs, Member, Origin


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.into = nn.Linear(6, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(48, 5)

    def forward(self, x):
        return self.out(self.lstm(self.into(x))[0])


class Attention(nn.Module):
    """`out_proj` of the attention is never called itself: the attention reads its weight."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(6, 32)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True),
            2,
            enable_nested_tensor=False,
        )
        self.out = nn.Linear(32, 5)

    def forward(self, x):
        return self.out(self.layers(self.into(x)))


class Tied(nn.Module):
    """One weight in two layers, one parameter that is registered before it, and buffers."""

    def __init__(self):
        super().__init__()
        self.into, self.first, self.second = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.norm, self.out = nn.BatchNorm1d(32), nn.Linear(32, 5)
        self.register_buffer("steps", torch.arange(3))

    def forward(self, x):
        x = self.second(torch.relu(self.first(self.into(x))))
        return self.out(self.norm(x.transpose(1, 2)).transpose(1, 2))


class Caching(nn.Module):
    """Keeps what it derived from a generated weight, as some models do in eval mode."""

    def __init__(self):
        super().__init__()
        self.into, self.middle, self.out = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 5)
        self.kept: Tensor | None = None

    def train(self, mode: bool = True):
        if mode:
            self.kept = None
        return super().train(mode)

    def forward(self, x):
        squared = self.kept if self.kept is not None else self.middle.weight @ self.middle.weight.T
        if not self.training:
            self.kept = squared.detach()
        return self.out(self.middle(self.into(x)) @ squared)


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 9)

    def forward(self, x):
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def mlp(width: int = 32, depth: int = 3, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(6, width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 5)).to(dtype)


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def _vectors(dtype: torch.dtype = torch.float32) -> Inputs:
    return Inputs((torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1)).to(dtype),))


OWN = {
    "lstm": (Recurrent, _vectors),
    "attention": (Attention, _vectors),
    "tied": (Tied, _vectors),
    "caching": (Caching, _vectors),
    "mlp": (mlp, _vectors),
    "bfloat16": (lambda: mlp(dtype=torch.bfloat16), lambda: _vectors(torch.bfloat16)),
    "float16": (lambda: mlp(dtype=torch.float16), lambda: _vectors(torch.float16)),
    "float64": (lambda: mlp(dtype=torch.float64), lambda: _vectors(torch.float64)),
    "convolutions": (convolutions, lambda: Inputs((torch.linspace(-1, 1, 600).reshape(2, 3, 10, 10),))),
}
HUGE = ("levit_128s", "resnet18", "vit_tiny_patch16_224")
NAMES = (*OWN, "bert", "gpt2", "t5", "llama", "mixtral", *HUGE)


def member(kind: str, name: str = "", seed: int = 0) -> Member:
    """A network as a member, the same for the same seed; `seed` 0 alone for those of `zoo`."""
    if kind not in OWN:
        made = zoo.member(kind)
        return Member(name or kind, made.module, made.inputs, made.origin)
    build, inputs = OWN[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build().eval()
    return Member(name or kind, module, inputs(), Origin("module", kind, type(module).__name__))


def plain_copy(member: Member) -> Member:
    """The same member with a module of its own."""
    return Member(member.name, copy.deepcopy(member.module), member.inputs, member.origin)


def sibling(base: Member, name: str, noise: float, seed: int) -> Member:
    """A fine-tune: the same network with noise on its matrices, relative to each one's own size."""
    generator = torch.Generator().manual_seed(seed)
    module = copy.deepcopy(base.module)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                p += noise * p.std() * torch.randn(p.shape, generator=generator).to(p)
    return Member(name, module, base.inputs, base.origin)


def family(kind: str, count: int) -> list[Member]:
    """A network and its fine-tunes."""
    base = member(kind)
    return [base, *(sibling(base, f"s{i}", 0.05, i) for i in range(1, count))]


def made(name, module, *args):
    return Member(name, module.eval(), Inputs(args), Origin("module", name, type(module).__name__))


def originals(members):
    """Copies of the members' modules, in eval mode."""
    return {m.name: copy.deepcopy(m.module).eval() for m in members}


def run(module: nn.Module, member: Member) -> tuple[Tensor, ...]:
    """Floating-point outputs on the member's own inputs; differentiable."""
    return tuple(tensors_in(module(*member.inputs.args, **member.inputs.kwargs)))


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: unlike `==`, they tell 0.0 from -0.0."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same_bits(found, expected):
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(bits(found[key]), bits(tensor)), key


def joined_alone(kind="tied"):
    """A joint model of one member, its module, and a plain copy of that."""
    one = member(kind)
    plain = plain_copy(one).module
    return join([one], block=(8, 8)), one.module, plain


def open_joint(*kinds, context=3, block=(8, 8)):
    """A joint model to train, its members' plain copies, and the members."""
    members = [member(kind) for kind in kinds]
    plain = {each.name: plain_copy(each) for each in members}
    return join(members, block=block).open(context), plain


def loss_of(outputs):
    return sum((t.float() ** 2).mean() for t in outputs)


def dictionary_gradients(joint):
    keys = list(joint.dictionary.banks)
    found = (
        {k: joint.dictionary[k].rows.grad for k in keys},
        {k: joint.dictionary[k].contexts.grad for k in keys},
    )
    for p in joint.parameters():
        p.grad = None
    return found


def assert_gradients(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        for key in other:
            difference = (one[key] - other[key]).norm()
            assert float(difference) <= tolerance * float(other[key].norm()), key


def outside_error(before, after, probes):
    """Relative L2 error of each output over all probes, written anew: the largest."""
    with torch.no_grad():
        pairs = [
            (tensors_in(before(*p.args, **p.kwargs)), tensors_in(after(*p.args, **p.kwargs))) for p in probes
        ]
    worst = 0.0
    for number in range(len(pairs[0][0])):
        wanted = torch.cat([one[number].double().flatten() for one, _ in pairs])
        found = torch.cat([other[number].double().flatten() for _, other in pairs])
        worst = max(worst, float((found - wanted).norm() / (wanted.norm() or 1.0)))
    return worst
