"""Mutations: seeded changes of files, of their bytes, of the documents and tensors in them, or of what they are."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
from pathlib import Path

DEEP, HUGE = "@deep@", "@huge@"  # what json.dumps cannot write itself


def mutate_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One change of bytes."""
    size = len(data)
    at = rng.randrange(max(size, 1)) if rng.random() < 0.5 else rng.randrange(max(min(size, 400), 1))
    length = rng.choice([1, 2, 8, 64, 1000])
    kind = rng.choice(["flip", "flip", "flip", "truncate", "insert", "duplicate", "remove", "zero", "empty"])
    if kind == "flip":
        changed = bytearray(data)
        for place in range(at, min(at + rng.choice([1, 1, 1, 4]), size)):
            changed[place] ^= 1 << rng.randrange(8)
        return bytes(changed), f"flip at {at}"
    done = {
        "truncate": data[:at],
        "insert": data[:at] + rng.randbytes(length) + data[at:],
        "duplicate": data[: at + length] + data[at:],
        "remove": data[:at] + data[at + length :],
        "zero": data[:at] + bytes(min(length, size - at)) + data[at + length :],
        "empty": b"",
    }
    return done[kind], f"{kind} {length} at {at}"


def mutate_value(value, rng: random.Random):
    """Something else in place of a value."""
    return rng.choice([
        None, True, "", "x" * 100_000, "../../../etc/passwd", "/dev/zero", "native", "a\0b", "\ud800", [], {}, [[]],
        {"a": 1}, [None], 0, -1, 1, 2**31, 2**63, 10**59, -(10**59), 1e308, float("nan"), float("inf"), 0.5, DEEP, HUGE,
        [value], {"x": value}, [value] * 50, str(value)[:50], [-1, 2**40], [60000, 20000], [10**9] * 9,
        value * 7 if isinstance(value, (int, float)) and not isinstance(value, bool) else value,
        value + 1 if isinstance(value, (int, float)) and not isinstance(value, bool) else [1, "a", None],
    ])  # fmt: skip


def mutate_document(document, rng: random.Random):
    """A JSON document with one to three places changed, and what was done."""
    document, done = copy.deepcopy(document), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(walk(document))
        if not places:
            return mutate_value(document, rng), "the whole"
        # Few deep places are as likely as many: by depth first.
        depth = rng.choice(sorted({len(path) for _, _, path in places}))
        holder, key, path = rng.choice([each for each in places if len(each[2]) == depth])
        kind = rng.choice(["replace", "replace", "replace", "delete", "rename", "swap", "repeat"])
        if kind == "delete":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[str(mutate_value(key, rng))[:200]] = holder.pop(key)
        elif kind == "swap":
            holder[key] = copy.deepcopy(rng.choice(places)[0])
        elif kind == "repeat" and isinstance(holder, list):
            holder[key:key] = [copy.deepcopy(holder[key])] * rng.choice([1, 300])
        else:
            holder[key] = mutate_value(holder[key], rng)
        done.append(f"{kind} {'.'.join(map(str, path))}"[:200])
    return document, ", ".join(done)


def walk(document, path=()):
    """Every place of a document: what holds it, its key, and the path to it."""
    items = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for key, value in list(items):
        yield document, key, (*path, key)
        yield from walk(value, (*path, key))


def dumps(document) -> str:
    text = json.dumps(document)
    return text.replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000).replace(f'"{HUGE}"', "9" * 6000)


def mutate_tensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A change of a safetensors file's header, of the document in it, or of its length."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.1:
        claimed = rng.choice([0, 1, length + 1, 2**63, 2**64 - 1, 10**8 + 1, length - 8])
        return claimed.to_bytes(8, "little") + data[8:], f"length {claimed}"
    inner = header.get("__metadata__", {}).get("document")
    if inner and rng.random() < 0.7:
        document, done = mutate_document(json.loads(inner), rng)
        header["__metadata__"]["document"] = dumps(document)
        done = f"document: {done}"
    elif rng.random() < 0.5 and len(header) > 2:  # whole tensors: left out, or another's
        names = [name for name in header if name != "__metadata__"]
        one, other = rng.sample(names, 2)
        if rng.random() < 0.5:
            header[one], done = header[other], f"{one} is {other}"
        else:
            header[one], header[other], done = header[other], header[one], f"{one} and {other} exchanged"
    else:
        header, done = mutate_document(header, rng)
    raw = dumps(header).encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + body, done


def mutate_kind(path: Path, rng: random.Random) -> str:
    """Something that is no ordinary file in place of one."""
    kind = rng.choice(["fifo", "folder", "loop", "device", "sparse", "nothing", "secret"])
    data = path.read_bytes()
    path.unlink()  # it may be a link to the original
    if kind == "sparse":
        path.write_bytes(data)
        os.truncate(path, 1 << 40)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "secret":
        path.symlink_to("/proc/self/environ")
    return kind


def mutate_file(path: Path, rng: random.Random) -> tuple[str, bool]:
    """Change one file; what was done, and whether its document was changed rather than its bytes."""
    if rng.random() < 0.06:
        return mutate_kind(path, rng), False
    data = path.read_bytes()
    structured = rng.random() < 0.65
    path.unlink()  # it may be a link to the original
    if structured and path.suffix == ".safetensors":
        changed, done = mutate_tensors(data, rng)
    elif structured and path.suffix == ".jsonl":
        lines = [json.loads(line) for line in data.splitlines()]
        lines, done = mutate_document(lines, rng)
        lines = lines if isinstance(lines, list) else [lines]
        changed = "".join(dumps(line) + "\n" for line in lines).encode("utf-8", "surrogatepass")
    elif structured and path.suffix == ".json":
        document, done = mutate_document(json.loads(data), rng)
        changed = dumps(document).encode("utf-8", "surrogatepass")
    elif structured and path.suffix == ".yaml":
        import yaml

        document, done = mutate_document(yaml.safe_load(data), rng)
        changed = dumps(document).encode("utf-8", "surrogatepass")
    else:
        structured = False
        changed, done = mutate_bytes(data, rng)
    path.write_bytes(changed)
    return done, structured


def seal(folder: Path, changed: str) -> None:
    """Give an artifact's manifest the size and hashes of a changed file, and a right checksum."""
    from surgery.artifact.manifest import manifest_bytes

    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        if changed != "manifest.json":
            data = (folder / changed).read_bytes()
            entry = manifest["files"][changed]
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            if "header" in entry:
                raw = data[8 : 8 + int.from_bytes(data[:8], "little")]
                entry["header"] = hashlib.sha256(raw).hexdigest()[:16]
        manifest.pop("checksum", None)
        sealed = manifest_bytes(manifest)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError, OverflowError):
        return  # no manifest any more
    path.unlink()
    path.write_bytes(sealed)
