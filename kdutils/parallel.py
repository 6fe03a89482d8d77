"""Small jobs side by side: in processes of their own, or in threads."""

from concurrent.futures import ThreadPoolExecutor

import torch


def _as_is(result):
    return result


class _Calls(torch.utils.data.Dataset):
    def __init__(self, function, items):
        self.function, self.items = function, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        with torch.inference_mode():
            return self.function(self.items[index])


def in_processes(function, items, workers):
    """Results of ``function(item)`` in order, from worker processes.

    Their torch runs on one thread each: the many small operations here lose more than they gain when each is split
    over threads, most of all on a machine with other work.
    """
    if not workers:
        return (function(item) for item in items)
    # Without a generator of its own the loader would draw on the caller's random numbers.
    return iter(
        torch.utils.data.DataLoader(
            _Calls(function, items),
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_is,
            generator=torch.Generator(),
        )
    )


def in_threads(function, items):
    """A list of ``function`` of each item, by as many threads as torch has: for code that lets go of Python's lock."""
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return list(threads.map(function, items))
