"""What the demo measures: the merge, real inputs before and after, and members reloaded from the folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import console
from .demo_inputs import SENTENCES, class_name, embed, pairs_found, top1, write_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.artifact.verify import VerifyReport
    from surgery.core.joint import JointModel
    from surgery.members.member import Inputs
    from surgery.settings.recipe import Recipe

Outputs = Mapping[str, Sequence[tuple["Tensor", ...]]]


@dataclass(frozen=True)
class Outcome:
    """The demo's findings.

    Attributes:
        joint: fitted.
        folder: the artifact.
        moved: relative L2 distance of each member's outputs on real inputs.
        cosines: of each sentence's embedding with the original one.
        pairs: sentences whose partner is their nearest neighbour, before and after.
        classes: per picture its class before and after; each photograph's whole picture comes first.
        same_weights: per member, whether the reloaded state dict equals the fitted one bit for bit.
        same_outputs: per member, whether the reloaded outputs equal the fitted ones bit for bit.
        verified: what `surgery verify` says of the folder.
    """

    joint: JointModel
    folder: Path
    moved: dict[str, float]
    cosines: list[float]
    pairs: tuple[int, int]
    classes: list[tuple[int, int]]
    same_weights: dict[str, bool]
    same_outputs: dict[str, bool]
    verified: VerifyReport

    @property
    def agreement(self) -> int:
        """Pictures whose class did not change."""
        return sum(before == after for before, after in self.classes)

    @property
    def proven(self) -> bool:
        """Whether the folder gives back exactly what was fitted."""
        return all(self.same_weights.values()) and all(self.same_outputs.values()) and self.verified.ok

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        from .outcome import result_json

        return {
            **result_json(self.joint, self.folder),
            "real_inputs": {
                "moved": self.moved,
                "cosines": self.cosines,
                "pairs_found": list(self.pairs),
                "sentences": len(SENTENCES),
                "same_class": self.agreement,
                "pictures": len(self.classes),
            },
            "reloaded": {"same_weights": self.same_weights, "same_outputs": self.same_outputs},
            "verified": self.verified.ok,
        }


def measure(recipe: Recipe, inputs: Path, *, overwrite: bool) -> Outcome:
    """Run the merge and measure what came of it.

    Args:
        recipe: of a text member and a vision member, in this order.
        inputs: folder for the real inputs.
        overwrite: whether the artifact may be replaced.
    """
    from surgery.artifact import load
    from surgery.artifact.verify import verify
    from surgery.pipeline.merge import merge, prepare, read_probes
    from surgery.util.progress import task

    prepared = prepare(recipe)
    text, image = (member.name for member in prepared.members)
    with task("Running the originals"):
        files = write_inputs(inputs)
        calibrate = tuple(f"{name}={file}" for name, file in zip((text, image), files, strict=True))
        real = read_probes(prepared.recipe.model_copy(update={"calibrate": calibrate}), prepared.members)
        before = outputs({member.name: member.module for member in prepared.members}, real)
    joint = merge(recipe, prepared=prepared, overwrite=overwrite)
    folder = Path(recipe.out or "")
    with task("Running what was written") as work:
        after = outputs({name: joint[name] for name in joint.names}, real)
        again = load(folder)
        reloaded = outputs({name: again[name] for name in again.names}, real)
        work.describe("Verifying")
        verified = verify(folder, origins=True)
    embeddings = [embed(found[text], real[text]) for found in (before, after)]
    classes = [top1(found[image]).tolist() for found in (before, after)]
    return Outcome(
        joint,
        folder,
        moved={name: distance(before[name], after[name]) for name in joint.names},
        cosines=(embeddings[0] * embeddings[1]).sum(1).tolist(),
        pairs=(pairs_found(embeddings[0]), pairs_found(embeddings[1])),
        classes=list(zip(*classes, strict=True)),
        same_weights={name: same_weights(joint, again, name) for name in joint.names},
        same_outputs={name: same_outputs(after[name], reloaded[name]) for name in joint.names},
        verified=verified,
    )


def outputs(modules: Mapping[str, nn.Module], inputs: Mapping[str, Sequence[Inputs]]) -> Outputs:
    """The outputs of each member for each of its batches."""
    from surgery.inputs.probes import outputs_of

    return {name: [outputs_of(module, batch) for batch in inputs[name]] for name, module in modules.items()}


def distance(before: Sequence[tuple[Tensor, ...]], after: Sequence[tuple[Tensor, ...]]) -> float:
    """The relative L2 distance of the main output over all batches, padding included."""
    moved = sum(
        float((new[0] - old[0]).double().square().sum()) for old, new in zip(before, after, strict=True)
    )
    whole = sum(float(old[0].double().square().sum()) for old in before)
    return (moved / whole) ** 0.5


def same_weights(joint: JointModel, again: JointModel, name: str) -> bool:
    """Whether two joint models give a member the same state dict, bit for bit."""
    import torch

    one, other = joint.collapse(name), again.collapse(name)
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def same_outputs(one: Sequence[tuple[Tensor, ...]], other: Sequence[tuple[Tensor, ...]]) -> bool:
    """Whether all outputs are equal, bit for bit."""
    import torch

    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) for first, second in pairs for a, b in zip(first, second, strict=True))


def print_outcome(outcome: Outcome, *, verbose: bool) -> None:
    """The findings on screen."""
    from .outcome import print_next, print_result

    print_result(outcome.joint, outcome.folder, verbose=verbose, advise=False)
    _print_real_inputs(outcome)
    console.heading("Given back")
    for name in outcome.joint.names:
        weights, found = _equal(outcome.same_weights[name]), _equal(outcome.same_outputs[name])
        console.say(f"{name}, reloaded from {outcome.folder}: weights {weights}, outputs {found}.")
    whole = "everything matches" if outcome.verified.ok else "MISMATCH"
    console.say(f"surgery verify {outcome.folder}: {whole}.")
    print_next(outcome.joint, outcome.folder)


def _print_real_inputs(outcome: Outcome) -> None:
    text, image = outcome.joint.names
    views = len(outcome.classes)
    console.heading("On real inputs, which the fit has not seen")
    table = console.table("member", "inputs", ">output moved by")
    table.add_row(text, f"{len(SENTENCES)} sentences", console.percent(outcome.moved[text], digits=2))
    table.add_row(image, f"{views} views of 3 photographs", console.percent(outcome.moved[image], digits=2))
    console.show(table)
    mean = sum(outcome.cosines) / len(outcome.cosines)
    found, lowest = outcome.pairs[1], min(outcome.cosines)
    console.say(
        f"{text}: cosine of a sentence's embedding with the original one {mean:.4f} on average, at least "
        f"{lowest:.4f}; {found} of {len(SENTENCES)} sentences find their paraphrase as nearest, "
        f"{outcome.pairs[0]} before."
    )
    console.say(f"{image}: the most likely class is the same for {outcome.agreement} of {views} views.")
    classes = console.table("photograph", "class before", "class after")
    for name, (before, after) in zip(("china", "flower", "grace_hopper"), outcome.classes[::5], strict=True):
        classes.add_row(name, class_name(before), class_name(after))
    console.show(classes)


def _equal(same: bool) -> str:
    return "equal bit for bit" if same else "DIFFERENT"
