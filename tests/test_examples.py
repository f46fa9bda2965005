"""Every example runs as it stands, in an empty folder, within a small budget."""

import ast
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from scripts import run_script

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def run(script, folder):
    """Output of a script in a process of its own, in an empty folder."""
    code, output, errors = run_script(script, folder, "--fast")
    assert code == 0, output + errors
    assert "Monitor:" not in errors  # how the warnings of a monitor begin
    return output


def events(folder):
    """Names of the tags in the event files below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    tags = EventAccumulator(str(file)).Reload().Tags()
    return {tag for kind in ("scalars", "histograms", "images") for tag in tags[kind]}


def advertised_folder(output):
    """Where the last line of an example says to look."""
    (folder,) = re.findall(r"tensorboard --logdir (\S+)$", output, re.MULTILINE)
    return folder


MEASURED = {
    "loss/train",
    "ntk/trace",
    "ntk/kernel",
    "ntk/eigenvalues_log10",
    "params/displacement",
    "jacobian/log_std",
    "jacobian/singular_values_log10",
}


def test_trainer_example_leaves_curves_where_it_says(tmp_path):
    output = run(EXAMPLES / "plain_trainer.py", tmp_path)
    assert events(tmp_path / advertised_folder(output)) >= MEASURED


def test_loop_example_leaves_curves_where_it_says(tmp_path):
    output = run(EXAMPLES / "plain_loop.py", tmp_path)
    assert events(tmp_path / advertised_folder(output)) >= MEASURED
    assert re.search(r"^loss \d\.\d+ after 10 steps$", output, re.MULTILINE)


def test_fabric_example_leaves_curves_where_it_says(tmp_path):
    output = run(EXAMPLES / "fabric_loop.py", tmp_path)
    drawn = {tag for tag in MEASURED if not tag.startswith("jacobian/")}
    assert events(tmp_path / advertised_folder(output)) >= drawn
    assert re.search(r"^loss \d\.\d+ after 29 steps$", output, re.MULTILINE)


def test_large_kernels_example_prints_a_plan_and_a_spectrum(tmp_path):
    output = run(EXAMPLES / "kernel_of_any_size.py", tmp_path)
    assert re.search(r"^layer.linear1.weight +(factored|materialized) ", output, re.M)
    assert "100.0% of the parameters are on fast routes" in output
    assert "(16, 16, 10, 10)" in output
    assert "J of the language model: 4000 × 65000" in output
    assert re.search(r"^trace [\d.e+]+ ± [\d.e+]+$", output, re.MULTILINE)


def test_kernel_example_prints_what_it_finds_without_importing_lightning(tmp_path):
    script = EXAMPLES / "kernel_in_a_notebook.py"
    code = f"""
import runpy, sys
sys.argv = [{script.name!r}, "--fast"]
runpy.run_path({str(script)!r}, run_name="__main__")
assert not {{'lightning', 'pytorch_lightning'}} & sys.modules.keys()
"""
    finished = subprocess.run(  # one that has imported nothing
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    output = finished.stdout
    assert "(40, 40, 10, 10)" in output
    assert "(400, 400)" in output
    assert len(re.findall(r"^layer .*alignment 0\.\d+$", output, re.MULTILINE)) == 2
    right = re.search(r"reads (\d+)% of the new images right", output)
    assert int(right[1]) > 80  # chance is 10 %
    assert not list(tmp_path.iterdir())


def test_training_example_is_foretold_by_its_kernel(tmp_path):
    output = run(EXAMPLES / "predicted_training.py", tmp_path)
    rows = re.findall(r"^ +(\d+) +(\S+) +(\S+) +(\S+) +(\S+)$", output, re.MULTILINE)
    assert [row[0] for row in rows] == ["0", "10", "100"]
    for row in rows:
        predicted, trained, new_predicted, new_trained = map(float, row[1:])
        # A network of width 256: the kernel moves by a few percent.
        assert predicted == pytest.approx(trained, rel=0.1)
        assert new_predicted == pytest.approx(new_trained, rel=0.05)
    assert float(rows[2][2]) < 0.2 * float(rows[0][2])
    off = re.findall(r"predicted by .*: (\S+)% off$", output, re.MULTILINE)
    plain, aware = map(float, off)
    assert aware < 1 < 50 < plain


def test_infinite_width_example_reads_images_and_approaches_the_limit(tmp_path):
    output = run(EXAMPLES / "infinite_width_kernel.py", tmp_path)
    right = re.findall(r"^.+ reads (\d+)% of the new images right$", output, re.M)
    assert len(right) == 3
    assert all(int(share) > 80 for share in right)  # chance is 10 %
    narrow, wide = re.findall(r"^width \d+: .+ by ([\d.]+)%$", output, re.M)
    assert float(wide) < 0.75 * float(narrow)  # four times the width
    assert not list(tmp_path.iterdir())


def test_next_step_of_adamw_is_foretold(tmp_path):
    output = run(EXAMPLES / "next_loss_change.py", tmp_path)
    rows = re.findall(r"^step +(\d+) (\S+) (\S+) (\S+) +\S+%$", output, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 2, 3, 6, 10, 12]
    for row in rows:
        plain, own, actual = map(float, row[1:])
        assert own == pytest.approx(actual, rel=0.05)
        assert actual / plain > 20
    assert not list(tmp_path.iterdir())


def test_history_example_reads_back_what_the_run_kept(tmp_path):
    output = run(EXAMPLES / "history_in_a_notebook.py", tmp_path)
    rows = re.findall(r"^step (\d+): kernel distance (\S+)$", output, re.MULTILINE)
    assert [int(step) for step, _ in rows] == [0, 29, 58]
    assert 0 == float(rows[0][1]) < float(rows[1][1]) < float(rows[2][1])
    assert "kernel of full outputs on 64 images" in output
    assert "kernels kept: 3 of shape (64, 64)" in output
    (folder,) = re.findall(r"ntk-report (\S+)$", output, re.MULTILINE)
    assert (tmp_path / folder / "ntk_history" / "ntk.jsonl").is_file()


def test_signals_follow_the_maps_of_mean_field_theory(tmp_path):
    output = run(EXAMPLES / "signal_by_depth.py", tmp_path)
    rows = re.findall(r"^ +(\d+)" + r" +(\S+) \( *(\S+)\)" * 3 + "$", output, re.M)
    assert [int(row[0]) for row in rows] == [2, 4, 8, 15] * 3
    for row in rows:
        q, q_theory, c, c_theory, chi, chi_theory = map(float, row[1:])
        # Width 200: √(2/200) = 10 % of scatter, and as much from the weights.
        assert q == pytest.approx(q_theory, rel=0.3)
        assert c == pytest.approx(c_theory, abs=0.1)
        assert chi == pytest.approx(chi_theory, rel=0.3)
    growth = [float(g) for g in re.findall(r"grow (\S+) times", output)]
    assert growth[0] < 0.01 < 0.1 < growth[1] < 10 < growth[2]
    assert not list(tmp_path.iterdir())


def test_a_lazy_network_keeps_its_features_and_patterns(tmp_path):
    output = run(EXAMPLES / "features_while_training.py", tmp_path)
    rows = re.findall(r"^ *(\d+) +(rich|lazy)" + r" +(\S+)" * 4 + "$", output, re.M)
    (rich, lazy) = (
        [float(value) for value in row[3:]] for row in rows if row[0] == "200"
    )
    assert all(moved > 3 * stayed for moved, stayed in zip(rich, lazy, strict=True))


def test_networks_at_the_edge_of_chaos_have_the_spectra_predicted(tmp_path):
    output = run(EXAMPLES / "edge_of_chaos.py", tmp_path)
    assert re.search(r"^σ_b 0\.60  \.+#\*+$", output, re.MULTILINE)
    pattern = r"^([\d.]+) +(gaussian|orthogonal) +(\S+) +(\S+) +(\S+) +(\S+)$"
    rows = re.findall(pattern, output, re.MULTILINE)
    assert len(rows) == 6
    for _, _, mean, foretold, largest, edge in rows:
        assert float(mean) == pytest.approx(float(foretold), rel=0.3)
        assert float(largest) == pytest.approx(float(edge), rel=0.4)
    means = [float(row[2]) for row in rows]
    assert means[0] < 0.3 < 0.6 < means[2] < 1.6 < 3 < means[4]


def test_twin_example_shows_where_learning_leaves_the_lazy_regime(tmp_path):
    output = run(EXAMPLES / "lazy_twin.py", tmp_path)
    rows = re.findall(r"^ +(\d+) +(0\.\d+) +(0\.\d+) +(\d\.\d+)$", output, re.M)
    assert [row[0] for row in rows] == ["0", "15", "30", "45", "60"]
    assert rows[0][1] == rows[0][2]
    assert rows[0][3] == "0.000"
    assert float(rows[-1][1]) > float(rows[-1][2]) > 0.6  # chance is 10 %
    scans = re.findall(r"^ +(\d+) +(\d+\.\d+) +(0\.\d+) +(0\.\d+)$", output, re.M)
    scans = [[float(number) for number in row] for row in scans if row not in rows]
    assert [row[0] for row in scans[-4:]] == [1, 4, 16, 64]
    for narrow, wide in pairwise(scans[-3:]):
        assert narrow[1] == pytest.approx(wide[1], rel=0.01)  # the function learns on
        assert narrow[2] == pytest.approx(4 * wide[2], rel=0.03)
        assert narrow[3] == pytest.approx(4 * wide[3], rel=0.03)
    step = re.search(r"kernel by (\S+)%; foretold: (\S+)%$", output, re.MULTILINE)
    assert float(step[1]) == pytest.approx(float(step[2]), rel=0.1)


def code_lines(script):
    """Numbers of the lines that are neither blank, comment nor docstring."""
    text = script.read_text()
    lines = {
        number
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.strip().startswith("#")
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def test_trainer_example_is_short_and_monitoring_is_one_line_of_it():
    script = EXAMPLES / "plain_trainer.py"
    assert len(code_lines(script)) <= 30
    uses = [
        line.strip() for line in script.read_text().splitlines() if "Monitor(" in line
    ]
    assert uses == [
        "callbacks=[NTKMonitor(), ParameterDriftMonitor(), JacobianMonitor()],"
    ]


def test_modes_of_a_kernel_decay_as_it_predicts(tmp_path):
    output = run(EXAMPLES / "kernel_in_depth.py", tmp_path)
    rows = re.findall(r"^ +(\d+) +([128]) +(\S+) \((\S+)\)", output, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [
        5,
        5,
        5,
        10,
        10,
        10,
        15,
        15,
        15,
        20,
        20,
        20,
    ]
    for row in rows:
        measured, predicted = float(row[2]), float(row[3])
        assert measured == pytest.approx(predicted, abs=0.05)  # both are about 0.7
    assert re.search(r"grown by \+0\.00\d along its start, 0\.00\d is new", output)


def test_where_linear_theory_ends(tmp_path):
    output = run(EXAMPLES / "where_linear_theory_ends.py", tmp_path)
    rows = [line.split() for line in output.splitlines() if line[:4].strip().isdigit()]
    assert [int(row[0]) for row in rows] == [0, 1, 2, 3, 6, 10, 18, 30]
    away = [float(row[1]) for row in rows[1:]]
    assert away == sorted(away)
    first = next(int(row[0]) for row in rows[1:] if float(row[1]) > 0.25)
    assert f"parted at step {first}" in output
    assert len({row[4] for row in rows}) == 1  # the kernel at first is one kernel
    assert float(rows[-1][3]) > 0.7


def test_hugging_face_trainer(tmp_path):
    output = run(EXAMPLES / "hugging_face_trainer.py", tmp_path)
    found = re.findall(r"step +(\d+): the kernel has changed by (\d+\.\d)%", output)
    assert [int(step) for step, _ in found] == [0, 1, 2, 3, 4, 6, 8]
    changes = [float(change) for _, change in found]
    assert changes[0] == 0
    assert changes[-1] > changes[1] > 0
    assert "ntk/relative_change" in events(tmp_path / "hugging_face" / "runs" / "ntk")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_example_can_be_read_from_top_to_bottom(script):
    text = script.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) < 80
    assert ast.get_docstring(tree)
    imported = {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    } | {
        name.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for name in node.names
    }
    known = {"sys", "torch", "lightning", "sklearn", "transformers", "ntk_callbacks"}
    assert imported <= known
    assert "ntk_callbacks.experiments" not in text


def test_every_example_is_run():
    names = {script.stem for script in SCRIPTS}
    assert names == {
        *("plain_trainer", "plain_loop"),
        *("kernel_in_a_notebook", "kernel_of_any_size", "history_in_a_notebook"),
        *("predicted_training", "infinite_width_kernel", "next_loss_change"),
        *("features_while_training", "where_linear_theory_ends"),
        *("signal_by_depth", "edge_of_chaos", "lazy_twin", "kernel_in_depth"),
        *("hugging_face_trainer", "fabric_loop"),
    }
