"""The mathematics of templates: fits against slow references, signatures, regularisers."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.methods.templates.solving import (
    SIGNATURES,
    attraction,
    entropy,
    fit_mixtures,
    signature,
    solve_templates,
    squared_error,
)

SIZES = st.tuples(st.integers(1, 7), st.integers(0, 999)).flatmap(
    lambda size: st.tuples(st.just(size[0]), st.integers(1, size[0]), st.just(size[1]))
)


def layers_of(count, seed, width=20):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mixing", ["linear", "softmax", "one-hot"])
@given(SIZES)
@settings(max_examples=40, deadline=None)
def test_a_fit_says_its_own_error_and_keeps_its_constraints(mixing, size):
    count, k, seed = size
    layers = layers_of(count, seed)
    mixtures, combine = fit_mixtures(layers @ layers.T, k, mixing, torch.Generator().manual_seed(seed))
    assert mixtures.shape == (count, k) and combine.shape == (k, count)
    found = mixtures @ combine @ layers
    error = float((found - layers).square().sum() / layers.square().sum())
    assert error == pytest.approx(squared_error(layers @ layers.T, mixtures, combine), abs=1e-9)
    if mixing != "linear":
        torch.testing.assert_close(mixtures.sum(1), torch.ones(count, dtype=torch.float64))
    if mixing == "softmax" and k > 1:
        assert float(mixtures.min()) > 0  # so that softmax can express and move it
    if mixing == "one-hot":
        assert set(mixtures.unique().tolist()) <= {0.0, 1.0}
    if k == count:
        assert error < 1e-12
    # Given these mixtures, no other templates are better.
    best = mixtures @ torch.linalg.lstsq(mixtures, layers).solution
    assert error <= float((best - layers).square().sum() / layers.square().sum()) + 1e-9


@given(SIZES)
@settings(max_examples=30, deadline=None)
def test_the_best_linear_and_affine_fits_are_reached(size):
    count, k, seed = size
    layers = layers_of(count, seed)
    gram = layers @ layers.T
    plain = torch.linalg.svdvals(layers)[k:].square().sum() / layers.square().sum()
    centred = layers - layers.mean(0)
    affine = torch.linalg.svdvals(centred)[k - 1 :].square().sum() / layers.square().sum()
    if k == count:
        affine = torch.zeros(())  # K points lie in K - 1 directions about their mean
    generator = torch.Generator()
    for mixing, wanted in (("linear", plain), ("softmax", affine)):
        assert squared_error(gram, *fit_mixtures(gram, k, mixing, generator)) == pytest.approx(
            float(wanted), abs=1e-9
        )


@given(st.integers(2, 6), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_clustering_finds_the_best_signature_of_few_layers(count, seed):
    layers = layers_of(count, seed, 4)
    gram, k = layers @ layers.T, 2
    best = min(
        squared_error(gram, one, solve_templates(one))
        for chosen in itertools.product(range(k), repeat=count)
        if len(set(chosen)) == k
        for one in [torch.nn.functional.one_hot(torch.tensor(chosen), k).double()]
    )
    found = fit_mixtures(gram, k, "one-hot", torch.Generator().manual_seed(seed))
    assert squared_error(gram, *found) == pytest.approx(best, abs=1e-9)


@given(st.sampled_from(SIGNATURES), SIZES)
@settings(max_examples=80, deadline=None)
def test_signatures_use_every_template(kind, size):
    count, k, seed = size
    chosen = signature(kind, count, k, torch.Generator().manual_seed(seed)).tolist()
    assert len(chosen) == count and set(chosen) == set(range(k))
    if kind in ("sequential", "progressive"):
        assert chosen == sorted(chosen)
    if kind == "cyclic":
        assert chosen == [layer % k for layer in range(count)]


def test_signatures_read_as_they_are_named():
    generator = torch.Generator()
    assert signature("sequential", 8, 4, generator).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert signature("cyclic", 8, 4, generator).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert signature("progressive", 10, 4, generator).tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    with pytest.raises(ValueError, match="between 1 and 4"):
        signature("cyclic", 4, 5, generator)
    with pytest.raises(ValueError, match="sequential, cyclic"):
        signature("spiral", 4, 2, generator)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_regularisers_are_least_at_a_signature(count, k, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, k, generator=generator, dtype=torch.float64)
    templates = torch.randn(k, 9, generator=generator, dtype=torch.float64)
    soft = logits.softmax(1)
    hard = torch.nn.functional.one_hot(soft.argmax(1), k).double()
    assert 0 <= float(entropy(soft)) <= 1 + 1e-12 and float(entropy(hard)) == pytest.approx(0, abs=1e-9)
    if k > 1:
        assert float(entropy(torch.full((count, k), 1 / k, dtype=torch.float64))) == pytest.approx(1)
    # The slow reference, layer by layer.
    slow = sum(
        float((soft[layer] @ templates - templates[int(soft[layer].argmax())]).square().sum())
        for layer in range(count)
    )
    slow /= count * float(templates.square().sum(1).mean())
    assert float(attraction(templates @ templates.T, soft)) == pytest.approx(slow, rel=1e-9, abs=1e-12)
    assert float(attraction(templates @ templates.T, hard)) == pytest.approx(0, abs=1e-12)
