"""The house rules that a reviewer should not have to check by eye."""

import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ntk_callbacks

PACKAGE = Path(ntk_callbacks.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HOMES = (ntk_callbacks.metrics, ntk_callbacks.dynamics, ntk_callbacks.theory)
PUBLIC = [
    (
        f"{home.__name__.removeprefix('ntk_callbacks').lstrip('.')}.{name}".lstrip("."),
        item,
    )
    for home in (ntk_callbacks, *HOMES)
    for name in home.__all__
    if not inspect.ismodule(item := getattr(home, name))
]
IDS = [name for name, _ in PUBLIC]
# What its formula says in one line needs no example, nor what a function returns, whose
# own example shows it.
WITHOUT_EXAMPLE = {"NTKOptions", "metrics.mean_square"} | {
    name
    for name, item in PUBLIC
    for _, function in PUBLIC
    if inspect.isfunction(function)
    if inspect.signature(function).return_annotation is item
}


def test_imports_flow_one_way():
    # In a process of its own: it silences the loggers of all that is imported here.
    code = (
        "import sys; from importlinter.cli import lint_imports;"
        "sys.path.insert(0, '.'); sys.exit(lint_imports(no_cache=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 300


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, ntk_callbacks;"
        "heavy = {'matplotlib', 'torchvision', 'hydra', 'omegaconf', 'tensorboard',"
        " 'lightning', 'pytorch_lightning', 'sklearn', 'transformers'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "item"), PUBLIC, ids=IDS)
def test_public_objects_are_documented(name, item):
    text = inspect.getdoc(item) or ""
    assert text, name
    if inspect.isfunction(item):
        arguments = [a for a in inspect.signature(item).parameters if a[0] != "_"]
        missing = [a for a in arguments if f"{a}:" not in text and f"*{a}" not in text]
        assert not missing, f"{name} does not describe {missing}"
        returns = inspect.signature(item).return_annotation is not None
        assert not returns or "Returns:" in text or "Yields:" in text, name
    if name not in WITHOUT_EXAMPLE:
        assert doctest.DocTestParser().get_examples(text), f"{name} has no example"


def test_every_exception_of_the_package_is_also_a_builtin():
    from ntk_callbacks import errors

    for name, item in vars(errors).items():
        if inspect.isclass(item):
            parents = [p for p in item.__mro__[1:] if p.__module__ == "builtins"]
            assert parents[0] not in (Exception, BaseException), name
