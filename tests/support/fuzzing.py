"""Fuzzing: small real things made once, `mutations` of their files, and what each verb makes of them.

Run as a program in a process of its own, whose memory is limited: `python tests/support/fuzzing.py FOLDER SEED COUNT`.
The last line of its output is JSON: how cases ended, and every fault with what reproduces it. A fault is an exception
that is no `SurgeryError`, a case that takes too long or too much memory, a message of more than a few KB, weights
that changed while `verify` finds nothing, or a file that is not the one that its artifact's manifest describes while
`verify` finds nothing. Case N of a seed is always the same: `... FOLDER SEED 1 N` runs it alone.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import stat
import sys
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from mutations import mutate_file, seal

SECONDS = 20  # of one case; far above what any takes, for a busy machine
MESSAGE = 5000  # characters
GROWTH = 1 << 30  # bytes by which the process may grow in one case
JSONS = (".json", ".jsonl", ".yaml")


# -- what is mutated ---------------------------------------------------------------------------------------


def make(folder: Path) -> None:
    """Two lossless members, the same fitted, a trained artifact, a run that was interrupted, and plain folders."""
    import timm
    import torch
    from tiny_transformers import save_tiny

    import surgery
    from surgery.pipeline.train import train_recipe
    from surgery.settings.recipe import Recipe

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_tiny("vit", folder / "plain-transformers")
    small = {"input_size": (3, 64, 64)}  # of example inputs
    net = timm.create_model("test_convnext", num_classes=5, pretrained_cfg_overlay=small).eval()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        timm.models.save_for_hf(net, str(folder / "plain-timm"), safe_serialization=True)
    (folder / "weights").mkdir()
    torch.save(net.state_dict(), folder / "weights" / "net.pth")
    members = [surgery.load_member(str(folder / f"plain-{kind}")) for kind in ("transformers", "timm")]
    twin = surgery.load_member(str(folder / "plain-transformers"), name="twin")
    with torch.no_grad():
        for name, tensor in twin.module.named_parameters():
            if "layer" in name and "intermediate" in name:
                tensor.mul_(2)
    joint = surgery.join([*members, twin], block=(8, 8))
    surgery.save(joint, folder / "lossless", recipe={"models": [{"model": "plain-timm"}], "seed": 3})
    surgery.fit(joint, max_error=0.05)
    surgery.save(joint, folder / "fitted", recipe={"models": [{"model": "plain-timm"}], "seed": 3})
    save_arrays(folder / "data.npz", torch.randn(24, 3, 32, 32), torch.arange(24) % 2)
    task = {"data": str(folder / "data.npz"), "batch": 8, "metric": "accuracy", "options": {"test": 8}}
    recipe = {
        "models": [{"model": str(folder / "plain-transformers"), "name": "net", "tasks": [task]}],
        "parameters": {"block": "8x8", "context": 2},
        "train": {"steps": 2, "generations": 2},
        "out": str(folder / "trained"),
    }
    train_recipe(Recipe.of(recipe), cpu=True)
    (folder / "recipe").mkdir()
    (folder / "recipe" / "recipe.yaml").write_text(Recipe.of(recipe).to_yaml())
    interrupted_run(folder / "run")


def save_arrays(path: Path, inputs, targets) -> None:
    import numpy as np

    np.savez(path, inputs=inputs.numpy(), targets=targets.numpy())


def interrupted_run(folder: Path) -> None:
    """A run that was asked to stop in the middle of its last contest."""
    from training_nets import build

    from surgery.training.loop.interruptions import Interrupted
    from surgery.training.loop.trainer import Trainer
    from surgery.training.train import train

    plain, steps = Trainer.train_step, []

    def step(self):
        plain(self)
        steps.append(1)
        if len(steps) == 8:
            os.kill(os.getpid(), signal.SIGINT)

    Trainer.train_step = step
    try:
        train(build(), run_tasks(), RUN, folder=folder, cpu=True)
    except Interrupted:
        return
    finally:
        Trainer.train_step = plain
    raise AssertionError("the run was not interrupted")


RUN = {
    "steps": 3, "burn_in": 1, "generations": 2, "final": 1, "save_seconds": 0,
    "evolution": {"epsilon": 0.1, "challengers": 2, "alpha": 0.7, "contexts": "fitted", "draw": "explain"},
    "optimizer": {"lr": 0.01, "schedule": "cosine", "warmup": 3},
}  # fmt: skip


def run_tasks():
    from training_nets import tasks

    return tasks()


# -- what is done with it ----------------------------------------------------------------------------------

ARTIFACTS = ("lossless", "fitted", "trained")
ACTIONS = {
    "lossless": ("load", "load", "verify", "verify-origins", "export-plain", "export-compressed", "inspect"),
    "fitted": ("load", "load", "verify", "verify-origins", "export-plain", "export-compressed", "page"),
    "trained": ("load", "verify", "evaluate", "evaluate", "report", "page"),
    "run": ("resume", "resume", "resume", "report", "page"),
    "recipe": ("check",),
    "plain-transformers": ("member",),
    "plain-timm": ("member",),
    "weights": ("weights",),
}
WEIGHTS = (4, 4, 5, 5, 2, 2, 2, 1)


def act(action: str, folder: Path, place: Path, corpus: Path):
    """Do one thing with a mutated folder; the weights that came out, where some did."""
    import surgery
    from surgery.artifact.verify import verify

    if action == "load":
        return surgery.load(folder).collapse()
    if action in ("verify", "verify-origins"):
        verify(folder, origins=action != "verify")
    elif action == "export-plain":
        surgery.export(folder, "plain-timm", place / "out")
    elif action == "export-compressed":
        surgery.export(folder, "plain-transformers", place / "out", format="compressed")
        return surgery.load(place / "out").collapse()
    elif action == "evaluate":
        from surgery.pipeline.train import evaluate_artifact

        evaluate_artifact(folder, data=str(corpus / "data.npz"))
    elif action == "report":
        command("report", folder, "--out", place / "pictures")
    elif action == "page":
        from surgery.page import look, render

        render(look(folder))
    elif action in ("inspect", "check"):
        command("recipes", "check", folder / "recipe.yaml")
    elif action == "member":
        surgery.load_member(str(folder))
    elif action == "weights":
        surgery.load_member(f"timm:test_convnext?num_classes=5={folder / 'net.pth'}")
    elif action == "resume":
        return resume(folder)
    return None


def command(*arguments) -> None:
    """The command line, with its errors as exceptions."""
    from surgery_cli.__main__ import app

    from surgery.errors import SurgeryError

    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            app([str(each) for each in arguments])
        except SystemExit as end:
            # Of a flag that what is left of the files has no use for.
            if end.code == 2 and "Invalid value" in err.getvalue():
                raise SurgeryError(err.getvalue().strip()[-MESSAGE:]) from None
            if end.code not in (0, None):
                raise
    if len(out.getvalue() + err.getvalue()) > 10 * MESSAGE:
        raise AssertionError(f"{len(out.getvalue())} characters of output")


def resume(folder: Path):
    from training_nets import build

    from surgery.errors import SurgeryError
    from surgery.training.train import train

    joint = build()
    before = fingerprint(joint.collapse())
    try:
        train(joint, run_tasks(), RUN, folder=folder, resume=True, cpu=True)
    except SurgeryError:
        if fingerprint(joint.collapse()) != before:
            raise AssertionError("a state that was refused changed the model in memory") from None
        raise
    return joint.collapse()


def fingerprint(weights) -> str:
    digest = hashlib.sha256()
    for member in sorted(weights):
        for name in sorted(weights[member]):
            tensor = weights[member][name].detach().cpu().contiguous()
            digest.update(f"{member}/{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(__import__("torch").uint8).numpy().tobytes())
    return digest.hexdigest()


class TooLong(BaseException):
    """A case took too long."""


def run_case(seed: int, number: int, corpus: Path, place: Path, expected: dict[str, str]) -> tuple[str, str]:
    """How one case ended, and which it was."""
    from surgery.errors import SurgeryError

    rng = random.Random(f"{seed} {number}")
    kind = rng.choices(list(ACTIONS), WEIGHTS)[0]
    action = rng.choice(ACTIONS[kind])
    folder = place / kind
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(corpus / kind, folder, copy_function=os.link)
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.suffix not in (".png", ".md")]
    if action in ("report", "page") and rng.random() < 0.7:
        files = [f for f in files if f.suffix == ".jsonl"] or files
    if action == "evaluate" and rng.random() < 0.5:
        files = [f for f in files if f.suffix == ".yaml"] or files
    if rng.random() < 0.5:
        files = [f for f in files if f.name in ("manifest.json", "state.safetensors")] or files
    path = rng.choice(files)
    changed = path.relative_to(folder).as_posix()
    if action == "resume":  # the log is cut in place
        for each in folder.iterdir():
            data = each.read_bytes()
            each.unlink()
            each.write_bytes(data)
    done, structured = mutate_file(path, rng)
    sealed = kind in ARTIFACTS and path.is_file() and path.stat().st_size < 1 << 30 and rng.random() < 0.7
    if sealed:
        seal(folder, changed)
    what = f"case {number}: {action} of {kind}, {changed}: {done}{', sealed' if sealed else ''}"
    rss, found = resident(), None
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        if kind in ARTIFACTS and not sealed and is_other(path, corpus / kind / changed):
            found = is_found(folder)
        weights = act(action, folder, place, corpus)
        said = "works"
    except SurgeryError as error:
        said = (
            "refused"
            if len(str(error)) <= MESSAGE
            else f"a message of {len(str(error)):,} characters: {str(error)[:200]}"
        )
        weights = None
    except SystemExit as error:
        said, weights = f"exit {error.code}", None
    except TooLong:
        said, weights = f"takes more than {SECONDS} s: {where()}", None
    except Exception as error:
        lines = traceback.extract_tb(error.__traceback__)
        own = [
            f"{Path(f.filename).name}:{f.lineno}"
            for f in lines
            if "surgery" in f.filename or "hostile" in f.filename
        ]
        said = f"{type(error).__name__}: {str(error)[:200]} ({' < '.join(own[::-1][:4])})"
        weights = None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if said in ("works", "refused") and resident() - rss > GROWTH:
        said = f"takes {(resident() - rss) >> 20} MiB"
    if said in ("works", "refused") and found is False:
        said = f"{said}, and verify finds nothing"
    if said == "works" and weights is not None:
        said = judge(weights, kind, action, folder, expected, structured or sealed)
    return said, what


def is_other(path: Path, original: Path) -> bool:
    """Whether something else is in place of a file, whatever it is."""
    if not os.path.lexists(path) or not stat.S_ISREG(path.lstat().st_mode):
        return True
    return path.stat().st_size != original.stat().st_size or path.read_bytes() != original.read_bytes()


def is_found(folder: Path) -> bool:
    """Whether `verify` says or finds that something is wrong."""
    from surgery.artifact.verify import verify
    from surgery.errors import SurgeryError

    try:
        return not verify(folder).ok
    except SurgeryError:
        return True


def judge(weights, kind, action, folder, expected, structured) -> str:
    """Whether weights that came out are those that went in, or `verify` says that they are not."""
    from surgery.artifact.verify import verify

    wanted = expected[f"{kind}/plain-transformers" if action == "export-compressed" else kind]
    if fingerprint(weights) == wanted:
        return "works"
    if kind == "run":  # a state that was written anew with right checksums is another state
        return "another state" if structured else "weights changed in silence"
    return (
        "changed, verify names it" if not verify(folder, origins=False).ok else "weights changed in silence"
    )


def where() -> str:
    return "see the traceback above"


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prepare(corpus: Path) -> dict[str, str]:
    """Make what is not made yet; fingerprints of all weights as they should be."""
    import surgery

    if not corpus.exists():
        make(corpus)
    expected = {}
    for kind in ARTIFACTS:
        weights = surgery.load(corpus / kind).collapse()
        expected[kind] = fingerprint(weights)
        for name, state in weights.items():
            expected[f"{kind}/{name}"] = fingerprint({name: state})
    place = corpus.with_name(f"{corpus.name}.place")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(corpus / "run", place)
    expected["run"] = fingerprint(resume(place))
    shutil.rmtree(place)
    return expected


def main(corpus: Path, seed: int, count: int, first: int = 0) -> None:
    """Run cases and print how they ended."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True  # read from the environment by whoever imported it
    faulthandler.enable()

    def ring(number, frame):
        faulthandler.dump_traceback(file=sys.stderr)
        raise TooLong

    signal.signal(signal.SIGALRM, ring)
    expected = prepare(corpus)
    soft = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + (6 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))
    place = corpus.with_name(f"{corpus.name}.case{seed}-{first}")
    ends: Counter[str] = Counter()
    faults = []
    for number in range(first, first + count):
        corpus.with_name(f"{corpus.name}.at{seed}").write_text(str(number))
        said, what = run_case(seed, number, corpus, place, expected)
        good = said in ("works", "refused", "changed, verify names it", "another state")
        ends[said if good else "FAULT"] += 1
        if not good:
            faults.append(f"seed {seed}, {what}: {said}")
            print(faults[-1], flush=True)
    shutil.rmtree(place, ignore_errors=True)
    print(json.dumps({"ends": ends, "faults": faults}))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["OMP_NUM_THREADS"] = "1"  # small tensors: threads would wait for one another
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
