"""Loading a compressed MiniLM against a plain one: `python -m benchmarks.load`.

`surgery.load` of a compressed export and `AutoModel.from_pretrained` of the original folder take turns in one
process, after one warm-up each, so imports and the disk cache are out of it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import surgery
from benchmarks import zoo
from benchmarks.harness import judge, make_header, make_parser, show, take_turns
from surgery.disk.files import bytes_below

LIMIT = 2.0
ERRORS = (0.05, 0.0)  # the default target, and without loss


def compressed(folder: Path, out: Path, max_error: float, seed: int) -> Path:
    """Write a compressed export of a transformers folder."""
    joint = surgery.join([surgery.load_member(str(folder), name="minilm")])
    surgery.fit(joint, max_error=max_error, seed=seed, device="cpu")
    return surgery.export(joint, "minilm", out, format="compressed")


def main(argv: Sequence[str] | None = None) -> None:
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        plain = zoo.tiny_text_folder(work / "plain", options.seed) if options.fast else zoo.minilm_folder()
        folders = {
            f"surgery.load, {'lossless' if not error else f'max-error {error:g}'}": compressed(
                plain, work / f"{error:g}", error, options.seed
            )
            for error in (ERRORS[:1] if options.fast else ERRORS)
        }
        competitors: dict[str, Callable[[], object]] = {
            "from_pretrained": lambda: AutoModel.from_pretrained(plain)
        }
        for name, folder in folders.items():
            competitors[name] = lambda folder=folder: surgery.load(folder)
        times = take_turns(competitors, 2 if options.fast else options.rounds)
        sizes = {"from_pretrained": bytes_below(plain), **{n: bytes_below(f) for n, f in folders.items()}}
    base = times["from_pretrained"].median
    results = [
        {
            "loaded by": name,
            "median ms": t.median * 1e3,
            "fastest ms": t.fastest * 1e3,
            "slowest ms": t.slowest * 1e3,
            "ratio": t.median / base,
            "bytes on disk": sizes[name],
        }
        for name, t in times.items()
    ]
    compared = next(iter(folders))
    verdicts = [judge(f"{compared} / from_pretrained", times[compared].median / base, LIMIT)]
    show("loading MiniLM", make_header("load", options, argv), results, verdicts, options.json)


if __name__ == "__main__":
    main()
