"""Tags are named in the docstring of their monitor, and none begins another."""

from monitored import Plain, all_monitors, fit


def test_public_docstring_names_every_tag_that_is_logged():
    run = fit(Plain(), all_monitors("epoch"), max_epochs=1)
    tags = {tag for row in run.recorder.measured().values() for tag in row}
    kinds = {type(monitor) for monitor in all_monitors()}
    text = " ".join(kind.__doc__ for kind in kinds)
    for tag in tags:
        known = "params_tensors/displacement/" if "_tensors" in tag else tag
        assert known in text, tag


def test_no_tag_begins_another_tag():
    # MLflow's file store keeps metrics as files and cannot hold both.
    run = fit(Plain(), all_monitors("epoch"), max_epochs=1)
    tags = {tag for row in run.recorder.measured().values() for tag in row}
    assert not [(a, b) for a in tags for b in tags if b.startswith(f"{a}/")]
