"""`make extras` is green only if every test of it ran, and on versions that are written down."""

from importlib.metadata import requires

from conftest import ROOT, run_python
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def test_a_missing_package_fails_the_run_of_extras_and_no_other(tmp_path):
    file = tmp_path / "test_client.py"
    file.write_text('from conftest import needs\n\n\n@needs("no_such_client")\ndef test_client():\n    pass\n')
    pytest = ["-m", "pytest", "-c", ROOT / "pyproject.toml", "-p", "conftest", file]
    by_hand = run_python(*pytest, PYTHONPATH=str(ROOT / "tests"))
    extras = run_python(*pytest, "-m", "extras and not soak", PYTHONPATH=str(ROOT / "tests"))
    assert by_hand.returncode == 0 and "1 skipped" in by_hand.stdout, by_hand.stdout
    assert extras.returncode == 1 and "1 error" in extras.stdout, extras.stdout
    assert all('no_such_client: pip install -e ".[clients]"' in run.stdout for run in (by_hand, extras))


def test_every_package_has_a_tested_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines}
    needed = {canonicalize_name(Requirement(line).name) for line in requires("cleangpt")}
    assert needed <= pinned, sorted(needed - pinned)
