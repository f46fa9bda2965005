"""A run with the cheapest monitor, and the steps that were measured."""

from monitored import Plain, fit

from ntk_callbacks import ParameterDriftMonitor


def drift(schedule):
    """The cheapest monitor; all share the shell that decides when to measure."""
    return ParameterDriftMonitor(schedule, on_error="raise")


def steps_of(schedule, model=None, before=(), after=(), **settings):
    """The steps that were logged; each must be logged once."""
    monitor = drift(schedule)
    run = fit(model or Plain(), [*before, monitor, *after], **settings)
    logged = run.recorder.steps("params/displacement")
    assert [step for step, _ in monitor.history] == logged
    return logged
