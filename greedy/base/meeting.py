"""The meeting of the processes that torchrun has started."""

import secrets
import time

import torch.distributed as dist

PAUSE = 0.01  # seconds


def fresh_store(store: dist.Store, rank: int, size: int) -> dist.Store:
    """Waits for all processes, and returns a store that they have for themselves.

    Where torchrun starts processes again, it gives them the store of those before, with the
    addresses that these have left in it. So each process names itself by a new word, to which the
    first one answers with its own.

    Args:
        store: torchrun's.
        rank: the number of this process.
        size: the number of processes.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"greedy/here/{rank}", own)
        first = store.get(f"greedy/welcome/{own}").decode()
        store.set(f"greedy/met/{first}/{rank}", "")
    else:
        first = own
        _welcome(store, own, set(range(1, size)))
    return dist.PrefixStore(first, store)


def _welcome(store: dist.Store, own: str, missing: set[int]) -> None:
    while missing:
        for here in (f"greedy/here/{rank}" for rank in missing):
            if store.check([here]):  # perhaps one that has ended
                store.set(f"greedy/welcome/{store.get(here).decode()}", own)
        time.sleep(PAUSE)
        missing = {rank for rank in missing if not store.check([f"greedy/met/{own}/{rank}"])}
