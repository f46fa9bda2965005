"""`ntk-report` as a user meets it: runs in, one page out, looked at in a browser."""

import re
from pathlib import Path

import pytest
import torch

from ntk_callbacks.cli_report import main, run_names
from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.history_file import FOLDER, HistoryFile


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made(folder, scale=1.0):
    file = HistoryFile(Path(folder, FOLDER), "ntk")
    for step in range(0, 50, 10):
        found = {"ntk/trace": scale * (step + 1), "ntk/kernel_distance": step / 100}
        file.append(Measurement(step, found), step - 10 if step else -1)
    return Path(folder)


def names_on(page):
    legend = re.search(r'<ul class="legend">(.*?)</ul>', page)[1]
    return re.findall(r"</svg>(.*?)</li>", legend)


def test_one_run(capsys):
    main([str(made("runs/first"))])
    assert capsys.readouterr().out == "report.html: 1 run\n"
    page = Path("report.html").read_text("utf-8")
    assert names_on(page) == ["first"]
    assert "<title>first ·" in page


def test_several_runs_are_named_by_what_tells_them_apart(capsys):
    folders = [str(made(f"out/{kind}/today")) for kind in ("mlp", "cnn")]
    main([*folders, "-o", "both.html"])
    assert capsys.readouterr().out == "both.html: 2 runs\n"
    assert names_on(Path("both.html").read_text("utf-8")) == ["mlp/today", "cnn/today"]


def test_folder_of_a_sweep_stands_for_its_runs_and_a_run_counts_once():
    for width in (128, 32):
        made(f"sweep/{width}")
    main(["sweep", "sweep/32", "sweep/128/ntk_history", "-o", "sweep.html"])
    assert names_on(Path("sweep.html").read_text("utf-8")) == ["32", "128"]


def test_what_a_run_was_started_with_is_on_the_page():
    hydra = made("run") / ".hydra"
    hydra.mkdir()
    (hydra / "overrides.yaml").write_text("- experiment=mlp\n- model.width=<32>\n")
    main(["run"])
    page = Path("report.html").read_text("utf-8")
    assert "ntk-train experiment=mlp model.width=&lt;32&gt;" in page


def test_run_without_a_measurement_is_left_out(capsys):
    made("runs/good")
    Path("runs/empty", FOLDER).mkdir(parents=True)
    Path("runs/empty", FOLDER, "ntk.jsonl").write_text("")
    main(["runs"])
    output = capsys.readouterr()
    assert "1 run" in output.out
    assert re.search(r"left out: .*no complete measurement in 'runs/empty", output.err)


def with_spectra(folder):
    file = HistoryFile(Path(folder, FOLDER), "ntk")
    for step in range(4):
        vectors = {"ntk/eigenvalues_log10": torch.arange(3.0) + step}
        file.append(Measurement(step, {"ntk/trace": 1.0 + step}, vectors), step - 1)
    return Path(folder)


def test_damaged_and_missing_files_cost_their_spectra_alone(capsys):
    for name in ("whole", "torn", "copied"):
        with_spectra(name)
    spectrum = Path("torn", FOLDER, "ntk-00000003.safetensors")
    spectrum.write_bytes(spectrum.read_bytes()[:-1])
    for path in Path("copied", FOLDER).glob("*.safetensors"):
        path.unlink()
    main(["whole", "torn", "copied"])
    found = capsys.readouterr()
    assert found.out == "report.html: 3 runs\n"
    assert "spectra of 1 measurement in 'torn', whose files are gone" in found.err
    assert "spectra of 4 measurements in 'copied', whose files are gone" in found.err
    assert "Copy the whole folder" in found.err
    page = Path("report.html").read_text("utf-8")
    for run, last in (("whole", 3), ("torn", 2)):
        assert f"{run}, step {last}: " in page
    assert "torn, step 3: " not in page
    assert page.count(": 4 at 3</title>") == 3  # the traces


def test_name_of_a_folder_that_is_no_valid_text():
    main([str(made("run\udcff")), str(made("größe")), "-o", "odd.html"])
    assert names_on(Path("odd.html").read_text("utf-8")) == ["run?", "größe"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "ntk-report: load_history: there is no folder 'nowhere'"),
        (["."], "ntk-report: load_history: '.' holds no ntk_history"),
    ],
)
def test_no_run_is_told_in_one_line(words, message):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert str(stop.value).startswith(message)
    assert not Path("report.html").exists()


@pytest.mark.parametrize(
    ("page", "why"),
    [
        ("missing/report.html", "No such file or directory"),
        ("run", "Is a directory"),
        ("/dev/full", "No space left on device"),
    ],
)
def test_page_that_cannot_be_written(page, why):
    words = f"^ntk-report: '{page}' cannot be written: {why}\\.$"
    with pytest.raises(SystemExit, match=words):
        main([str(made("run")), "-o", page])


def test_help_says_what_a_run_is(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "folder of a run" in capsys.readouterr().out


def test_names_are_different_for_different_folders():
    folders = [Path(p) for p in ("a/b", "a/b/c", "a/c/c")]
    assert run_names(folders) == ["b", "b/c", "c/c"]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["0_a=1,b=2,c=3", "1_a=1,b=9,c=4"], ["b=2,c=3", "b=9,c=4"]),
        (["0_a=1", "1_a=1,b=2"], ["0_a=1", "1_a=1,b=2"]),  # nothing is left of one
        (["0_a=1", "1_a=1"], ["0_a=1", "1_a=1"]),
        (["08-00", "08-01"], ["08-00", "08-01"]),
    ],
)
def test_runs_of_a_sweep_are_called_by_what_differs(folders, names):
    assert run_names([Path("sweep", folder) for folder in folders]) == names


def test_links_are_called_as_the_user_calls_them():
    for width in (32, 128):
        link = Path(f"width{width}")
        link.symlink_to(made(f"sweep/a_very_long_name_{width}").resolve())
    main(["width32", "width128"])
    page = Path("report.html").read_text("utf-8")
    assert names_on(page) == ["width32", "width128"]


# The browser.


SEEN = """
const box = e => e.getBoundingClientRect();
const texts = [...document.querySelectorAll("figure svg text")];
return {
  ground: getComputedStyle(document.body).backgroundColor,
  color: getComputedStyle(document.querySelector("path.run1")).stroke,
  wider: document.documentElement.scrollWidth - window.innerWidth,
  fetched: performance.getEntriesByType("resource").length,
  curves: [...document.querySelectorAll("figure path.run1")].map(e => box(e).width),
  outside: texts.filter(e => {
    const [text, svg] = [box(e), box(e.closest("svg"))];
    return text.left < svg.left - 1 || text.right > svg.right + 1
        || text.bottom > svg.bottom + 1 || text.top < svg.top - 1;
  }).map(e => e.textContent),
};
"""


@pytest.mark.parametrize("width", [1360, 420], ids=["desktop", "phone"])
def test_page_in_light_and_dark(browser, width):
    made("runs/32")
    made("runs/128", 1000.0)
    main(["runs"])
    found = {}
    for mode in ("light", "dark"):
        wanted = {"features": [{"name": "prefers-color-scheme", "value": mode}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(Path("report.html").absolute().as_uri())
        found[mode] = browser.execute_script(SEEN)
        assert found[mode]["wider"] <= 0
        assert found[mode]["fetched"] == 0
        assert found[mode]["outside"] == []
        assert len(found[mode]["curves"]) == 2
        assert min(found[mode]["curves"]) > 0.6 * min(width, 300)
    assert found["light"]["ground"] == "rgb(255, 255, 255)"
    assert found["dark"]["ground"] == "rgb(20, 23, 27)"
    assert found["light"]["color"] != found["dark"]["color"]
    assert not browser.get_log("browser")
