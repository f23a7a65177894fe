"""Questions that adapters are asked before they become another one: are they whole, and of one base?"""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..base.fingerprint import BaseRecord, base_record, same_base
from ..core.adapter import Adapter
from ..errors import BaseModelError, TargetError
from ..io.safetensors import check_numbers


def check_whole(adapter: Adapter, action: str) -> None:
    """TargetError for a sharded adapter, CheckpointError for a NaN in it."""
    if adapter.is_sharded:
        problem = f"adapter {adapter.name!r} is sharded by {adapter.sharded_by}"
        raise TargetError(f"{problem}\n  save it, and {action} it in one process")
    memory = f"adapter {adapter.name!r} in memory"
    check_numbers(adapter.state_dict(), memory, "go back to an earlier file of it", adapter.specs())


def common_base(root: nn.Module, chosen: Sequence[Adapter]) -> BaseRecord:
    """The record of the base that all of them belong to, with the fingerprints of all their layers. Raises
    BaseModelError."""
    first, *others = chosen
    joined = first.base_record
    if not others:
        return joined
    layers = {site.path: site.base.as_it_is_now() for adapter in chosen for site in adapter.sites()}
    live = base_record(root, layers.values())
    is_live = same_base(joined, live.at(joined.fingerprint))
    for adapter in others:
        record = adapter.base_record
        shared = record.fingerprint.keys() & joined.fingerprint.keys()
        alike = same_base(record.at(shared), joined.at(shared))
        if not alike or same_base(record, live.at(record.fingerprint)) != is_live:
            raise BaseModelError(
                f"adapters {first.name!r} and {adapter.name!r} belong to different bases\n"
                f"  {first.name}: {first.base_record}\n  {adapter.name}: {record}\n"
                f"  one of them was loaded with verify_base=False: keep them apart"
            )
        # Those of shared layers are equal.
        joined = replace(joined, fingerprint=joined.fingerprint | record.fingerprint)
    return joined
