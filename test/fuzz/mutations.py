"""What the fuzzer changes in trees, texts and bytes."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

HUGE, DEEP = "@HUGE@", "@DEEP@"
HOSTILE = (None, True, "", "\0", "a\0b", "x" * 5000, "\ud800", "\x1b[2J", "../../x", "/dev/zero",
           "a\nb", "=1+1", -1, 0, 1e308, float("nan"), float("inf"), 2 ** 31, 2 ** 63, 10 ** 30,
           HUGE, DEEP, [], {}, [[]], [None], "1e999", "0x10", " 7 ", "<b>", "1" * 40)
TEXTS = [value for value in HOSTILE if isinstance(value, str)]
SIDE = (40, 30)


def places(value, path=()):
    """Paths of all parts of nested lists and dictionaries."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list) else ()
    for key, part in items:
        yield from places(part, path + (key,))


def mutate_tree(rng, value):
    """Change one part of nested lists and dictionaries, in place where that is possible."""
    path = rng.choice(list(places(value)))
    if not path:
        return rng.choice([value, rng.choice(HOSTILE)])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    action, key = rng.randrange(6), path[-1]
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, list):
        parent.append(parent[key])
    elif action == 2:
        parent[key] = [parent[key]]
    elif action == 3 and isinstance(parent[key], (int, float)):
        parent[key] = rng.choice([-parent[key], parent[key] * 10 ** 6, str(parent[key]), 0.5])
    else:
        parent[key] = rng.choice(HOSTILE)
    return value


def as_json(rng, value):
    """JSON of a tree after some mutations; sometimes not quite."""
    for _ in range(rng.randint(1, 3)):
        value = mutate_tree(rng, value)
    text = json.dumps(value).replace(json.dumps(HUGE), "9" * 5000).replace(
        json.dumps(DEEP), "[" * 20000 + "]" * rng.choice([20000, 0]))
    data = text.encode("ascii")
    return mutate_bytes(rng, data) if rng.random() < 0.2 else data


def mutate_bytes(rng, data):
    """Flip, cut, repeat or insert some bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        action = rng.randrange(6)
        if action == 0:
            del data[at:]
        elif action == 1:
            data[at:at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
        elif action == 2:
            data[at:at] = data[at:at + rng.randrange(1, 60)] * rng.choice([1, 3])
        elif action == 3:
            data[at:at] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        elif at < len(data):
            data[at] = rng.randrange(256)
    return bytes(data)


def mutate_text(rng, text):
    """Replace a word of a text, or mutate its bytes."""
    if rng.random() < 0.2:
        return text.encode("utf-8")
    if rng.random() < 0.3:
        return mutate_bytes(rng, text.encode("utf-8"))
    words = text.split(" ")
    for _ in range(rng.randint(1, 3)):
        words[rng.randrange(len(words))] = rng.choice(TEXTS)
    return " ".join(words).replace(HUGE, "9" * 5000).replace(DEEP, "[" * 3000).encode(
        "utf-8", "surrogatepass")


def photo(path, kind=None, size=SIDE):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(str(path), kind)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
