"""How much an error in each tensor moves its member's output.

For an error delta in tensor W with independent entries, the output y moves by J delta, and
E|J delta|^2 = mean(diag(J^T J)) * |delta|^2. The diagonal's mean is estimated for all tensors at once: with a
random sign vector v, (v^T J) is one backward pass, and the mean of its squared entries is unbiased
(Hutchinson). Outputs are scaled by their norms, so the result is relative squared output error per squared
weight error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from surgery.fitting.learning import LARGEST
from surgery.fitting.metric import Draws, Metric, mean_square, metric_of, together
from surgery.fitting.pieces import in_pieces
from surgery.fitting.trial import Trial
from surgery.fitting.widened import in_float32
from surgery.geometry.views import CanonicalView
from surgery.inputs.probes import same_draws, tensors_in
from surgery.members.member import Inputs
from surgery.slots.slots import locate
from surgery.storage.codecs import decode, encode, grouped
from surgery.util import memory, progress

COARSE = grouped(4, 64)  # how tensors are rounded where derivatives say nothing
LEAST = 1e-8  # relative squared output error that leaving all of such tensors out counts as, at least
MOST = 0.9  # of the weights
SAMPLES = 2  # for each probe batch; the mean over a tensor averages thousands of entries more
SMALL, MORE = 1 << 17, 4  # weights that a backward pass takes milliseconds for, and how many passes these get


def sensitivities(trial: Trial, seed: int, samples: int | None = None) -> dict[str, float]:
    """Relative squared output error per squared error of each tensor, by name.

    Tensors that no gradient reaches (buffers, integer tensors, unused weights, non-differentiable models) are
    absent.

    Args:
        trial: the member with its original weights.
        seed: of the sign vectors.
        samples: backward passes for each probe batch; by default as many as tell more.
    """
    return metrics(trial, seed, {}, samples)[0]


def metrics(
    trial: Trial,
    seed: int,
    views: Mapping[str, CanonicalView],
    samples: int | None = None,
    outputs: Collection[str] = (),
) -> tuple[dict[str, float], dict[str, Metric]]:
    """Sensitivities, and what any error in a site costs, by name; sites that no gradient reaches are absent.

    Args:
        trial: the member with its original weights.
        seed: of the sign vectors.
        views: of the sites that are asked for; a weight is one matrix of all their rows, `[S * out, in]`. Where there
            are some, large batches are drawn in pieces.
        samples: backward passes for each probe batch; by default as many as tell more.
        outputs: sites of which the moment of inputs is not wanted as a whole.
    """
    draws: dict[str, Sequence[Draws]] = {}
    total: dict[str, Tensor] = {}  # on the device, which is not waited for

    def add(name: str, gradient: Tensor, batch: int) -> None:
        if name in draws:
            own = draws[name][batch % len(draws[name])]
            power = own.add(views[name].to_matrices(gradient).flatten(0, 1))
        else:
            power = mean_square(gradient)
        total[name] = total[name] + power if name in total else power

    with in_float32(trial) as probes:
        probes = in_pieces(trial, probes) if views else probes
        shapes = [tuple(tensor.shape) for tensor in trial.originals.values()]
        if samples is None:
            # Of many pieces one draw each tells enough of outputs alone.
            alone = len(probes) > 1 and bool(views) and set(views) <= set(outputs)
            samples = 1 if alone else samples_of(shapes, len(probes))
            if trial.calibration is not trial.probes:  # twice as many batches
                samples = max(1, samples // 2)
        # Both halves take twice the room, and of large members draws take as much as weights.
        small = sum(map(math.prod, shapes)) <= LARGEST
        for name in views:
            halves = 2 if len(probes) > 1 and small else 1
            count = samples * len(probes) // halves
            draws[name] = [Draws(count, inputs=name not in outputs) for _ in range(halves)]
        _draw(trial, probes, seed, samples, add)
    found = {name: metric_of(each, samples) for name, each in draws.items()}
    # One that overflowed is as good as none: the tensor's errors are then measured.
    powers = {name: float(power) for name, power in total.items()}
    sensitive = {name: power / samples for name, power in powers.items() if 0 < power < math.inf}
    return sensitive, {name: metric for name, metric in found.items() if metric is not None}


def samples_of(shapes: Iterable[tuple[int, ...]], batches: int) -> int:
    """Backward passes for each of some batches: one where most weights are so large that more tell nothing.

    Draws of such a weight are added up until their sum is multiplied (`surgery.fitting.metric.together`), and one more
    of each batch makes the sums longer, not more. Moments of a small model are of few draws, and more of them cheap.

    Args:
        shapes: of the weights.
        batches: how many there are.

    Example:
        >>> [samples_of(each, 8) for each in ([(2048, 2048), (256, 2048)], [(384, 384), (1536, 384)], [(256, 64)])]
        [1, 2, 4]
    """
    sizes = [(shape[0], math.prod(shape[1:])) for shape in shapes if len(shape) > 1 and math.prod(shape)]
    if sum(math.prod(size) for size in sizes) <= SMALL:
        return MORE
    large = [together(*size, SAMPLES * batches) >= SAMPLES for size in sizes]
    return 1 if sum(large) > MOST * len(large) else SAMPLES


def _draw(
    trial: Trial, probes: Sequence[Inputs], seed: int, samples: int, add: Callable[[str, Tensor, int], None]
) -> None:
    """Give every parameter's gradient v^T J of each batch and random sign vector v to `add`, and the batch's number."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: getattr(*locate(trial.module, name)) for name in trial.originals}
    parameters = {n: p for n, p in tensors.items() if isinstance(p, nn.Parameter) and p.is_floating_point()}
    frozen = [p for p in trial.module.parameters() if p.is_floating_point() and not p.requires_grad]
    norms = [norm or 1.0 for norm in trial.norms]
    try:
        for p in frozen:  # what is not trained is stored like everything else
            p.requires_grad_(True)
        with progress.task(f"{trial.name}: sensitivities", samples * len(probes)) as task:
            for _ in range(samples if parameters else 0):
                for number, inputs in enumerate(probes):

                    def own(name: str, gradient: Tensor, batch: int = number) -> None:
                        add(name, gradient, batch)

                    _one_sample(trial, inputs, parameters, norms, generator, own)
                    task.advance()
    finally:
        for p in frozen:
            p.requires_grad_(False)


def measured_sensitivities(trial: Trial, names: Sequence[str]) -> dict[str, float]:
    """What `sensitivities` estimates, measured by rounding, for tensors that no gradient reaches: one number for all.

    Args:
        trial: the member with its original weights.
        names: of floating-point tensors, rounded together.
    """
    own = {name: trial.originals[name] for name in names}
    coarse = {name: decode(encode(tensor, COARSE)) for name, tensor in own.items()}
    with trial.running_with(coarse):
        moved = trial.error() ** 2
    change = sum(float((coarse[name] - own[name]).double().square().sum()) for name in names)
    energy = sum(float(tensor.double().square().sum()) for tensor in own.values())
    # An exact form is better than another, however little it bears.
    least = LEAST / energy if energy > 0 else 1.0
    found = moved / change if change > 0 and math.isfinite(moved) else 1.0 / energy if energy > 0 else 1.0
    return dict.fromkeys(names, max(found, least))


def _one_sample(
    trial: Trial,
    inputs: Inputs,
    parameters: Mapping[str, Tensor],
    norms: Sequence[float],
    generator: torch.Generator,
    add: Callable[[str, Tensor], None],
) -> None:
    """Give v^T J of every parameter to `add`, for one batch and one v.

    Each is given as soon as it is complete, and let go of: all of them take as much memory as the weights. What
    `add` raises is raised; what the backward pass raises means that the model cannot be differentiated.
    """
    raised: list[Exception] = []

    def watched(name: str, gradient: Tensor) -> None:
        try:
            add(name, gradient)
        except Exception as error:
            raised.append(error)
            raise

    try:
        with same_draws(trial.module), torch.enable_grad():
            outputs = tensors_in(trial.module(*inputs.args, **inputs.kwargs))
            loss = torch.zeros((), device=trial.device)
            for output, norm in zip(outputs, norms, strict=True):
                if output.requires_grad:
                    output = torch.view_as_real(output) if output.is_complex() else output
                    signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device) * 2 - 1
                    loss = loss + (output.float() * signs).sum() / norm
        if loss.requires_grad:
            with _given(parameters, watched):
                loss.backward(inputs=list(parameters.values()))
    except RuntimeError as error:  # a model that cannot be differentiated is measured, not derived
        if memory.ran_out(error):
            raise
        if raised:
            raise raised[0] from None


@contextmanager
def _given(parameters: Mapping[str, Tensor], add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, gradients of parameters go to `add` and not to their `grad`, which is what it was afterwards."""
    before = {name: p.grad for name, p in parameters.items()}

    def give(name: str, p: Tensor) -> None:
        gradient, p.grad = p.grad, None
        if gradient is not None:
            add(name, gradient)

    for p in parameters.values():
        p.grad = None
    hooks = [p.register_post_accumulate_grad_hook(partial(give, name)) for name, p in parameters.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, p in parameters.items():
            p.grad = before[name]
