"""Gradients of joint models: through calls, through steps, and the slow way, location by location."""

import weakref

import pytest
import torch
from nets import assert_gradients, dictionary_gradients, loss_of, open_joint, run
from torch import nn

from surgery.core.joint import JointModel


def slow_gradients(joint: JointModel, plain, loss):
    """The plain models' gradients carried through the dictionary, one location at a time. # Eq. (5)"""
    rows = {key: torch.zeros_like(joint.dictionary[key].rows) for key in joint.dictionary.banks}
    contexts = {key: torch.zeros_like(joint.dictionary[key].contexts) for key in rows}
    for name, one in plain.items():
        one.module.zero_grad()
        loss(run(one.module, one)).backward()
        named = dict(one.module.named_parameters(remove_duplicate=False))
        for p in joint.plan.of(name):
            bank, grid = joint.dictionary[p.bank], p.grid
            matrices = p.site.view.to_matrices(named[p.site.name].grad).float()
            padded = matrices.new_zeros(grid.stack, grid.tiles[0] * grid.m, grid.tiles[1] * grid.n)
            padded[:, : grid.out, : grid.into] = matrices
            location = p.start
            for s in range(grid.stack):
                for i in range(grid.tiles[0]):
                    for j in range(grid.tiles[1]):
                        g = padded[s, i * grid.m : (i + 1) * grid.m, j * grid.n : (j + 1) * grid.n].reshape(
                            -1
                        )
                        c, psi = bank.context, int(bank.psi[location])
                        h = slice(psi * c, psi * c + c)
                        contexts[p.bank][location] = bank.rows.detach()[h] @ g
                        rows[p.bank][h] += bank.contexts.detach()[location].unsqueeze(1) * g
                        location += 1
    return rows, contexts


@pytest.mark.parametrize(
    "kinds",
    [(k,) for k in ("bert", "t5", "mixtral", "lstm", "attention", "tied", "convolutions")]
    + [("gpt2", "tied")],
)
def test_gradients_of_calls_and_steps_are_those_of_the_plain_models(kinds):
    joint, plain = open_joint(*kinds)
    for name in kinds:
        loss_of(run(joint[name], plain[name])).backward()
    by_call = dictionary_gradients(joint)
    with joint.step():
        for name in kinds:
            loss_of(run(joint[name], plain[name])).backward()
    by_step = dictionary_gradients(joint)
    expected = slow_gradients(joint, plain, loss_of)
    # Weights differ from the plain ones by rounding (1e-7), which depth amplifies.
    assert_gradients(by_call, expected, 2e-4)
    assert_gradients(by_step, by_call, 1e-5)
    for key, gradient in by_step[0].items():
        used = joint.dictionary[key].codes()[0].unique()
        assert bool((gradient[used].abs().sum(1) > 0).all())
    private = [p for body in joint.bodies for p in body.parameters()]
    assert private and all(p.grad is None for p in private)


def test_micro_batches_add_up():
    joint, plain = open_joint("bert")
    ids = plain["bert"].inputs.kwargs["input_ids"]
    with joint.step():
        (joint["bert"](input_ids=ids).last_hidden_state ** 2).sum().backward()
    whole = dictionary_gradients(joint)
    with joint.step():
        for part in ids.split(1):
            (joint["bert"](input_ids=part).last_hidden_state ** 2).sum().backward()
    # Sums in another order: some rounding errors.
    assert_gradients(dictionary_gradients(joint), whole, 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant):
    joint, plain = open_joint(kind)
    joint.train()
    for module in joint.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            joint[kind].gradient_checkpointing_enable({"use_reentrant": reentrant})
        with joint.step():
            loss_of(run(joint[kind], plain[kind])).backward()
        results.append(dictionary_gradients(joint))
        if not reentrant:
            loss_of(run(joint[kind], plain[kind])).backward()
            results.append(dictionary_gradients(joint))
    for found in results[1:]:
        assert_gradients(found, results[0], 1e-6)


def test_autocast_reaches_the_members_and_not_the_dictionary():
    joint, plain = open_joint("bert")
    exact = {key: w.clone() for key, w in joint.generate().items()}
    with torch.autocast("cpu", torch.bfloat16):
        for key, weight in joint.generate().items():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, exact[key])
        with joint.step():
            assert joint["bert"].encoder.layer[0].intermediate.dense.weight.dtype == torch.float32
            loss_of(run(joint["bert"], plain["bert"])).backward()
        found = dictionary_gradients(joint)
        loss_of(run(plain["bert"].module, plain["bert"])).backward()
    assert all(g.dtype == torch.float32 for part in found for g in part.values())


@pytest.mark.slow
def test_a_compiled_member_follows_the_dictionary():
    joint, plain = open_joint("attention")
    one = plain["attention"]
    compiled = torch.compile(joint["attention"], backend="aot_eager")
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(run(compiled, one), run(joint.extract("attention"), one))
            for p in joint.dictionary.parameters():
                p.mul_(1.1)
    with joint.step():
        loss_of(run(compiled, one)).backward()
    by_step = dictionary_gradients(joint)
    loss_of(run(compiled, one)).backward()
    by_call = dictionary_gradients(joint)
    loss_of(run(joint["attention"], one)).backward()
    expected = dictionary_gradients(joint)
    assert_gradients(by_step, expected, 1e-5)
    assert_gradients(by_call, expected, 1e-5)


def test_gradients_of_weights_are_gone_before_those_of_rows_are_made():
    joint, plain = open_joint("bert")
    (bank,) = (joint.dictionary[key] for key in joint.dictionary.banks)
    held: list[int] = []

    with joint.step() as leaves:
        loss_of(run(joint["bert"], plain["bert"])).backward()
        own = [weakref.ref(leaf.grad) for leaf in leaves.values() if leaf.grad is not None]
        hook = bank.rows.register_hook(lambda gradient: held.append(sum(ref() is not None for ref in own)))
    hook.remove()
    assert len(own) > 1
    assert held == [0]
