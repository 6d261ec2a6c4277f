"""Quotas: most slots that an owner may hold at once, as whoever runs the cluster has written them. Pure."""

from __future__ import annotations

import yaml

from configs.errors import UserError

_EXAMPLE = "write one line for each owner, such as `ann: 16`, and `'*': 8` for all others"


def parse(text: str, where: str) -> dict[str, int]:
    """Slots by owner; `*` is everybody who isn't named. An empty text sets none.

    Args:
        text: YAML, a mapping of owners to slots.
        where: path to name in an error.

    Raises:
        UserError: for anything else, naming the owner and the value.
    """
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not a YAML ({' '.join(str(error).split())}); {_EXAMPLE}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{where} is not a mapping of owners to slots; {_EXAMPLE}")
    for owner, slots in tree.items():
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 0:
            raise UserError(
                f"{where}: the quota of {owner} is {slots!r}, and must be a number of slots, 0 or more"
            )
    return {str(owner): slots for owner, slots in tree.items()}
