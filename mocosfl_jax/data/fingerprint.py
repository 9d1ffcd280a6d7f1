"""What tells a data set from another or a changed one, without decoding its images.

A fingerprint is a dict of JSON types. All have `kind` (`folder`, `npz`, `tfds`, `synthetic`),
`images` (their number, by split) and `class_names` (a list or None); some sources add more:

- folder: `pictures`, the size in bytes of each by its name relative to the folder;
- npz: `arrays`, dtype, shape and CRC of each that is read, by its name;
- tfds: `name`, `version` and `splits`;
- any, with a second data set mixed in: `mixed`, the fingerprint of that one.

Nothing in it depends on where the files lie, nor on config fields such as `image_size`,
`holdout_fraction` and `seed`: images are counted before any are held out.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from mocosfl_jax.errors import one_line


def fingerprint(
    kind: str, num_train: int, num_test: int, class_names: Sequence[str] | None, **facts: Any
) -> dict[str, Any]:
    """The fingerprint of a source of this `kind`; `facts`: what only this kind has, JSON types."""
    return {
        "kind": kind,
        "images": {"train": num_train, "test": num_test},
        "class_names": None if class_names is None else list(class_names),
        **facts,
    }


def difference(stored: dict[str, Any], found: dict[str, Any]) -> str | None:
    """How a data set differs from the one that was there before.

    Args:
        stored: its fingerprint then, as read from JSON, even if somebody has edited it.
        found: its fingerprint now.

    Returns: None for the same data set, else one printable line with the first difference, such as
        `121 -> 120 pictures (first missing: a/17.png)` or `a/3.png: 812 -> 640 bytes`.
    """
    if stored == found:
        return None
    return one_line(next(_changes(_dict(stored), _dict(found)), "another fingerprint"))


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """All differences, the most telling first."""
    yield from _changed_values({"kind": old.get("kind")}, {"kind": new.get("kind")})
    before, after = _dict(old.get("pictures")), _dict(new.get("pictures"))
    yield from _changed_names("pictures", list(before), list(after))
    yield from _changed_values(before, after, "{}: {} -> {} bytes")
    classes_before, classes_now = _names(old.get("class_names")), _names(new.get("class_names"))
    yield from _changed_names("classes", classes_before, classes_now)
    yield from _changed_values(
        dict(enumerate(classes_before)), dict(enumerate(classes_now)), "class {}: {} -> {}"
    )
    for key, text in (
        ("arrays", "array {}: {} -> {}"),
        ("splits", "{} split: {} -> {}"),
        ("images", "{} images: {} -> {}"),
    ):
        yield from _changed_values(_dict(old.get(key)), _dict(new.get(key)), text)
    if "mixed" in old and "mixed" in new:
        changes = _changes(_dict(old["mixed"]), _dict(new["mixed"]))
        yield from (f"mixed in: {change}" for change in changes)
    yield from _changed_values(old, new)


def _changed_names(noun: str, old: list[str], new: list[str]) -> Iterator[str]:
    known_before, known_now = set(old), set(new)
    missing = [f"first missing: {name}" for name in old if name not in known_now]
    added = [f"first new: {name}" for name in new if name not in known_before]
    if missing or added:
        yield f"{len(old)} -> {len(new)} {noun} ({', '.join(missing[:1] + added[:1])})"


def _changed_values(
    old: dict[Any, Any], new: dict[Any, Any], text: str = "{}: {} -> {}"
) -> Iterator[str]:
    """`text` with the key, the old and the new value, for each key whose values differ."""
    for key in old | new:
        before, after = old.get(key, "missing"), new.get(key, "missing")
        if before != after:
            yield text.format(key, _shown(before), _shown(after))


def _shown(value: Any) -> str:
    return f"another {type(value).__name__}" if isinstance(value, dict | list) else str(value)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _names(value: Any) -> list[str]:
    return [_shown(name) for name in value] if isinstance(value, list) else []
