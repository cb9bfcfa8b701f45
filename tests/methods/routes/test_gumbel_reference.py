"""Training the Gumbel-Matrix, against a slow reference that is written from the paper's text, one number at a time."""

import math

import pytest
import torch
from surgery_recipes.routed import D, related
from surgery_recipes.routed import regression as net_of

import surgery
from surgery.training.tasks.tasks import Task

TASKS, SEED, LR, RATE, BUDGET, PENALTY, ROUNDS = 4, 3, 0.01, 4.0, 0.3, 0.7, 12
NAMES = [f"t{n}" for n in range(TASKS)]


def trained(alternate):
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        module, inputs = net_of(TASKS, component_budget=BUDGET, penalty=PENALTY)
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    member = surgery.load_member(module, name="net", inputs=inputs)
    joint = surgery.join([member], surgery.make_plan([surgery.discover(member, private=["re:.*"])]))
    tasks = [
        Task(name, "net", related(n, batch=8, seed=SEED)["train"], "mse") for n, name in enumerate(NAMES)
    ]
    config = {
        "steps": ROUNDS, "generations": 1, "final": 0, "alternate": alternate, "stopping": {"keep": "last"},
        "optimizer": {"lr": LR}, "evolution": {"change": "none", "codes": "ones"},
    }  # fmt: skip
    surgery.train(joint, tasks, config, seed=SEED, cpu=True)
    return start, joint["net"].state_dict()


def by_hand(start, alternate):
    """The weights after training: a mean of those that are on, straight-through samples, Adam."""
    generator = torch.Generator().manual_seed(SEED)
    batches = [iter(related(n, batch=8, seed=SEED)["train"]) for n in range(TASKS)]
    p = {
        name: tensor.clone().requires_grad_() for name, tensor in start.items() if tensor.is_floating_point()
    }
    logits = p["routed.gates.0.logits"]
    weights = [tensor for name, tensor in p.items() if tensor is not logits and "phase" not in name]
    adam = torch.optim.Adam([{"params": weights}, {"params": [logits], "lr": RATE * LR}], lr=LR)
    passes = 0
    for _ in range(ROUNDS):
        order = torch.randperm(TASKS, generator=generator).tolist() if alternate else range(TASKS)
        for task in order:
            x, y = next(batches[task])
            u = torch.rand(4, 2, generator=generator)
            temperature = max(0.5, 50 / math.sqrt(passes + 1))
            passes += 1
            f = [
                torch.relu(
                    x @ p[f"routed.components.0.{i}.0.weight"].t() + p[f"routed.components.0.{i}.0.bias"]
                )
                for i in range(4)
            ]
            z, slope = (
                [],
                [],
            )  # each component's value, and how much its softmax moves with its logit of being on
            for i in range(4):
                on, off = (logits[task, i] - (-u[i].log()).log()).tolist()
                soft = 1 / (1 + math.exp((off - on) / temperature))
                z.append(float(on >= off))
                slope.append(soft * (1 - soft) / temperature)
            count = max(sum(z), 1)
            h = sum((z[i] * f[i] for i in range(4)), torch.zeros_like(f[0])) / count
            leaf = h.detach().requires_grad_()
            head, bias = p[f"heads.components.{task}.weight"], p[f"heads.components.{task}.bias"]
            share = 1.0 if alternate else 1 / TASKS
            loss = ((leaf @ head.t() + bias).squeeze(-1) - y).square().mean() * share
            loss.backward()
            h.backward(leaf.grad)
            if logits.grad is None:
                logits.grad = torch.zeros_like(logits)
            q = [1 / (1 + math.exp(off - on)) for on, off in logits[task].tolist()]
            for i in range(4):
                alone = sum(z) <= 1 and z[i] == sum(z)  # without it, or before it, there are zeros
                moved = f[i] if alone else (f[i] - h) / count
                gradient = float((leaf.grad * moved.detach()).sum()) * slope[i]
                if sum(q) / 4 > BUDGET:
                    gradient += share * PENALTY * q[i] * (1 - q[i]) / 4
                logits.grad[task, i] += torch.tensor([gradient, -gradient])
            if alternate or task == TASKS - 1:
                adam.step()
                adam.zero_grad()
    return {name: tensor.detach() for name, tensor in p.items()}


@pytest.mark.parametrize("alternate", [True, False])
def test_training_is_what_the_paper_says(alternate):
    start, found = trained(alternate)
    assert D == 128
    for name, wanted in by_hand(start, alternate).items():
        torch.testing.assert_close(
            found[name], wanted, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not torch.equal(found["routed.gates.0.logits"], start["routed.gates.0.logits"])
