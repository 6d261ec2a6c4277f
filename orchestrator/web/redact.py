"""What looks like a secret is taken out of everything that leaves the server, and numbers become JSON."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

REDACTED = "[redacted]"
_WORDS = r"(?:api[_-]?key|access[_-]?key|private[_-]?key|secret|passwd|password|passphrase|credential|authorization)"
_NAMES = re.compile(
    rf"(?:^|[^a-z])(?:{_WORDS}|cookie)s?(?:$|[^a-z])|(?:^|[_-])(?:key|auth|sig|signature)$|token$",
    re.IGNORECASE,
)
"""Names of fields and variables that hold secrets."""
_PIECE = re.compile(
    r"(?<![a-z])(?:begin|bos|cls|each|end|eos|first|last|mask|next|pad|per|sep|start|unexpected|unk|unknown)[ _-]$",
    re.IGNORECASE,
)
"""Before `token` where that is a piece of a text."""
_ASSIGN = r"[\w-]{0,40}\\*[\"']?\s*[:=]\s*"
"""From the word in a name to its value. The quotes of a text within a text have backslashes."""
_QUOTED = r"\\*\"[^\"\n]*\"|\\*'[^'\n]*'"
_ASSIGNED = re.compile(
    rf"(?P<header>\b(?:authorization|cookie)\\*[\"']?:\s*)(?:{_QUOTED}|[^\n\"']+)"
    rf"|(?P<name>(?:{_WORDS}|-signature){_ASSIGN})(?:Bearer\s+|Basic\s+)?(?:{_QUOTED}|[^\s\"',;}}]+)"
    r"|(?P<parameter>[?&](?:[\w.-]*[_-])?(?:sig|signature|key|auth)=)[^&\s\"'<>#]{6,}"
    rf"|(?P<word>(?<!\S)(?:--(?!-)[\w-]*?(?:{_WORDS}[\w-]*|token)|login\s+\S+\s+password)[ \t]+)[^\s-]\S*",
    re.IGNORECASE,
)
"""Headers to the end of their line, settings, parameters of addresses, and words of a command or of `.netrc`."""
_TOKEN = re.compile(rf"(?P<name>token(?![a-z]){_ASSIGN})(?P<value>{_QUOTED}|[^\s\"',;&}}]+)", re.IGNORECASE)
_PLAIN = re.compile(
    r"(?:[-+]?\d{1,12}(?:[.,_]\d+)*(?:e[-+]?\d+)?(?:[kmgtp]?i?b?|[munµ]?s|%)(?:/s|/\d{1,12})?|[-+]?inf|nan|none|null|true|false|)"
    r"[.:)\]]*|[<\[({$].*",
    re.IGNORECASE,
)
"""Values of a `token` that are counts, times, marked pieces of a text, names of variables, or nothing."""
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|glpat-[A-Za-z0-9_-]{18,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{35}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}|wandb_v1_[A-Za-z0-9_]{20,})\b"
    r"|(?<=://)(?:[^\s/:@]+:[^\s/@]+|[^\s/:@]{16,})(?=@)"
    r"|\b[Bb]earer\s+[A-Za-z0-9._~+/-]{16,}=*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
_MANY = 16
_SHORTEST = 8
"""Characters of a value of the environment that is looked for elsewhere."""


class Redactor:
    """Takes secrets out of texts and trees.

    Args:
        environment: whose values of secret names are taken out wherever they stand.
        more: other secrets, such as the server's own tokens.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, more: tuple[str, ...] = ()) -> None:
        env = os.environ if environment is None else environment
        values = {value for name, value in env.items() if is_secret(name) and len(value) >= _SHORTEST}
        known = sorted({*values, *(one for one in more if len(one) >= _SHORTEST)}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def text(self, text: str) -> str:
        """A text without secrets."""
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        text = _ASSIGNED.sub(lambda m: str(m[m.lastgroup or 0]) + REDACTED, text)
        text = _TOKEN.sub(_token, text)
        return _SHAPES.sub(REDACTED, text)

    def tree(self, tree: Any, name: str = "") -> Any:
        """A tree of plain data without secrets, whose numbers are all finite or None."""
        if isinstance(tree, str):
            return REDACTED if tree and is_secret(name) else self.text(tree)
        if isinstance(tree, Mapping):
            return {self.text(str(key)): self.tree(value, str(key)) for key, value in tree.items()}
        if isinstance(tree, list | tuple | set | frozenset):
            return self._list(tree, name)
        if isinstance(tree, bool) or tree is None or isinstance(tree, int):
            return tree
        if isinstance(tree, float):
            return tree if math.isfinite(tree) else None
        if is_dataclass(tree) and not isinstance(tree, type):
            return self.tree(asdict(tree), name)
        return self.text(str(tree))

    def _list(self, items: Collection[Any], name: str) -> list[Any]:
        """A list of it; one of numbers, or of the same few texts, at a small part of the price."""
        kinds = set(map(type, items))
        if kinds <= {int, bool, type(None)}:
            return list(items)
        if kinds <= {int, bool, type(None), float}:
            return [None if value is not None and not math.isfinite(value) else value for value in items]
        if kinds == {str} and len(items) > _MANY:
            known = {text: self.tree(text, name) for text in set(items)}
            return [known[text] for text in items]
        return [self.tree(value, name) for value in items]


def is_secret(name: str) -> bool:
    """Whether a field or a variable of this name holds a secret."""
    last = name.rsplit(".", 1)[-1]
    return bool(_NAMES.search(last)) and not _PIECE.search(last.lower().removesuffix("token"))


def _token(match: re.Match[str]) -> str:
    """A token without its value, unless that isn't a secret's."""
    piece = _PIECE.search(match.string, max(0, match.start() - 16), match.start())
    plain = _PLAIN.fullmatch(match["value"].strip("\\\"'"))
    return match[0] if piece or plain else match["name"] + REDACTED


def numbers(values: Any, digits: int = 6) -> list[Any]:
    """An array of numbers as nested lists, with so many significant digits; None for what isn't finite."""
    import numpy as np  # commands take secrets out too, and do without

    array = np.asarray(values, dtype=np.float64)
    with np.errstate(all="ignore"):
        size = np.floor(np.log10(np.abs(np.where(array == 0, 1.0, array))))
        factor = 10.0 ** (digits - 1 - size)
        rounded = np.round(array * factor) / factor
    rounded = np.where(np.isfinite(rounded), rounded, array)  # factors of very small numbers overflow
    if np.isfinite(rounded).all():
        plain: list[Any] = rounded.tolist()
        return plain
    mixed = rounded.astype(object)
    mixed[~np.isfinite(rounded)] = None
    return list(mixed.tolist())
