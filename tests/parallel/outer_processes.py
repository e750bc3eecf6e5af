"""The real processes of test_outer.py and test_outer_rows.py."""

import json

import torch.multiprocessing as mp


def found_by(work, world, folder):
    """What each of ``world`` processes that run ``work(rank, folder)`` wrote to ``found RANK.json``; none is left."""
    context = mp.get_context("spawn")
    workers = [context.Process(target=work, args=(rank, str(folder)), daemon=True) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
        worker.kill()
    return [json.loads((folder / f"found {rank}.json").read_text()) for rank in range(world)]
