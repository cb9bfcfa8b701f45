"""What members take in memory that run as they are stored, and what that costs: `python -m benchmarks.residency`.

MiniLM within 5% of its outputs, and ten fine-tunes of one vision transformer (differences of rank 4 at its linear
layers and small ones elsewhere, drawn at random), each loaded plainly, packed, packed with more spare bytes
(`shared`), and packed with a cache of all weights that are used. Bytes are those of PyTorch's own accounting: of
weights, and the most that a forward pass allocates besides (its profiler on a CPU, its allocator on a GPU). Also how
long it takes to make one module another member.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import surgery
from benchmarks import zoo
from benchmarks.harness import judge, make_header, make_parser, show, take_turns

OF_STORED, SLOWER, FAMILY = 1.15, 1.5, 1.3
FINE_TUNES, RANK = 10, 4
BOUND = 0.05
CACHE = 1 << 30  # bytes: all that is used


def plain_bytes(modules: Sequence[torch.nn.Module]) -> int:
    """Bytes of the weights of ordinary modules."""
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    return sum({each.untyped_storage().data_ptr(): each.nbytes for each in tensors}.values())


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most that is allocated at once while something runs."""
    run()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def drawn_encoder(folder: Path, seed: int) -> Path:
    """Write a text encoder of MiniLM's shape with weights drawn at random, for machines without its package."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    size = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    BertModel(BertConfig(**size)).save_pretrained(folder)
    return folder


def fine_tunes(folder: Path, seed: int, fast: bool, count: int = FINE_TUNES) -> list[Path]:
    """Write fine-tunes of one vision transformer, three where it has to be fast."""
    from transformers import ViTConfig, ViTForImageClassification

    width, depth, side = (32, 1, 32) if fast else (128, 4, 32)
    torch.manual_seed(seed)
    config = ViTConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=4)
    config.intermediate_size, config.image_size, config.patch_size = 4 * width, side, 8
    base = ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(seed + 1)
    found = []
    for number in range(3 if fast else count):
        net = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.ndim == 2:
                    left, right = (torch.randn(n, RANK, generator=generator) for n in parameter.shape)
                    parameter += 0.2 * float(parameter.std()) * left @ right.T / RANK**0.5
                else:
                    parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
        net.save_pretrained(folder / f"vit-{number}")
        found.append(folder / f"vit-{number}")
    return found


def compare(
    folder: Path, inputs: dict[str, dict[str, Any]], rounds: int, device: str
) -> list[dict[str, Any]]:
    """Bytes and seconds of each way of holding an artifact's members, the first of which runs."""
    rows, runs = [], {}
    for way, cache in ((None, 0), ("packed", 0), ("shared", 0), ("packed", CACHE)):
        joint = surgery.load(folder, resident=way, cache=cache, device=device)  # pyright: ignore
        name = joint.names[0]
        with torch.inference_mode():
            joint[name](**inputs["batch"])
        held = (
            plain_bytes([joint.extract(each) for each in joint.names])
            if way is None
            else joint.resident_bytes
        )
        stored = surgery.load(folder, resident="packed").stored_bytes if way is None else joint.stored_bytes

        def run(module: torch.nn.Module = joint[name], given: str = "batch") -> None:
            with torch.inference_mode():
                module(**inputs[given])

        label = f"{way or 'plain'}{', cache' if cache else ''}"
        rows.append({"way": label, "held": held, "of stored": held / stored, "peak": peak_bytes(run, device)})
        runs |= {(label, given): (lambda run=run, given=given: run(given=given)) for given in inputs}
    times = take_turns({f"{way}, {given}": run for (way, given), run in runs.items()}, rounds, device=device)
    for row in rows:
        for given in inputs:
            row[f"{given}, ms"] = 1000 * times[f"{row['way']}, {given}"].median
            row[f"{given}, times plain"] = (
                times[f"{row['way']}, {given}"].median / times[f"plain, {given}"].median
            )
    return rows


def switches(folder: Path, rounds: int, device: str) -> dict[str, float]:
    """Milliseconds to get another member: one module that changes, and a load of it alone."""
    joint = surgery.load(folder, resident="packed", device=device)
    names = joint.names
    joint.activate(names[0])
    for name in names:
        joint.activate(name)
    turns = iter(list(names) * (rounds + 2))
    times = take_turns(
        {
            "activate": lambda: joint.activate(next(turns)),
            "load": lambda: surgery.load(folder, members=[names[1]], device=device),
        },
        rounds,
        device=device,
    )
    return {name: 1000 * each.median for name, each in times.items()}


def texts_of(folder: Path, options: Any) -> dict[str, Any]:
    """Tokens of 32 sentences, or of nobody's where an encoder's weights are nobody's."""
    if options.fast or options.drawn:
        ids = torch.arange(96 if options.fast else 672).view(32, -1) % (20 if options.fast else 30000)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    from transformers import AutoTokenizer

    lines = (Path(__file__).parent / "sentences.txt").read_text().splitlines()
    said = [line for line in lines if line.strip()][:32]
    return dict(
        AutoTokenizer.from_pretrained(folder)(said, padding=True, truncation=True, return_tensors="pt")
    )


def fitted(folders: Sequence[Path], out: Path, seed: int) -> Path:
    """Write the artifact of some models within the bound."""
    joint = surgery.join([surgery.load_member(str(each)) for each in folders])
    return surgery.save(surgery.fit(joint, max_error=BOUND, seed=seed, device="cpu"), out)


def encoder_rows(work: Path, options: Any, rounds: int) -> list[dict[str, Any]]:
    """Ways of holding a sentence encoder, compared."""
    if options.fast:
        folder = zoo.tiny_text_folder(work / "plain", options.seed)
    else:
        folder = drawn_encoder(work / "plain", options.seed) if options.drawn else zoo.minilm_folder()
    batch = {name: each.to(options.device) for name, each in texts_of(folder, options).items()}
    inputs = {"batch": batch, "one": {name: each[:1] for name, each in batch.items()}}
    return compare(fitted([folder], work / "text", options.seed), inputs, rounds, options.device)


def family_rows(work: Path, nets: Sequence[Path], options: Any, rounds: int) -> list[dict[str, Any]]:
    """Ways of holding fine-tunes of one model, compared, the first two with what another member takes."""
    out = fitted(nets, work / "family", options.seed)
    picture = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(options.seed)).to(
        options.device
    )
    inputs = {"batch": {"pixel_values": picture}, "one": {"pixel_values": picture[:1]}}
    rows = compare(out, inputs, rounds, options.device)
    switched = switches(out, rounds, options.device)
    rows[0]["another member, ms"], rows[1]["another member, ms"] = switched["load"], switched["activate"]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    from transformers.utils.logging import disable_progress_bar

    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--drawn", action="store_true", help="an encoder of MiniLM's shape with random weights"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rounds = 2 if options.fast else options.rounds
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        encoder = encoder_rows(work, options, rounds)
        nets = fine_tunes(work, options.seed, options.fast)
        family = family_rows(work, nets, options, rounds)
    results = [
        {"members": name, **row, "another member, ms": row.get("another member, ms")}
        for name, rows in (("sentence encoder", encoder), (f"{len(nets)} vision transformers", family))
        for row in rows
    ]
    one, many = encoder[1], family[2]
    verdicts = [
        judge(f"packed encoder keeps at most {OF_STORED} of its stored bytes", one["of stored"], OF_STORED),
        judge(
            f"its forward pass of 32 takes at most {SLOWER} of a plain one", one["batch, times plain"], SLOWER
        ),
        judge(f"the family, shared, keeps at most {FAMILY} of its stored bytes", many["of stored"], FAMILY),
    ]
    header = make_header("residency", options, argv)
    show("what members take that run as they are stored", header, results, verdicts, options.json)


if __name__ == "__main__":
    main()
