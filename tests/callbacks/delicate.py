"""A run that any careless measurement disturbs, and what is left of it."""

from functools import cache

from monitored import Delicate, fit, loader, seeded

DELICATE = {"accumulate_grad_batches": 2, "max_epochs": 3}


def delicate_run(callbacks=(), **settings):
    seeded()
    return fit(
        Delicate(),
        callbacks,
        train=loader(15, shuffle=True, drop_last=False),
        val=loader(6),
        **(DELICATE | settings),
    )


@cache
def bare_trace():
    return delicate_run().trace()
