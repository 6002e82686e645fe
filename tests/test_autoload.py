"""Autoload: on, off, and what programs of an environment notice, each in a Python of its own."""
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from timm_epfs.cli import main
from timm_epfs.core import PruningError
from timm_epfs.zoo.autoload import autoload_path, is_on, switch_off, switch_on

ROOT = Path(__file__).parents[1]
TIMM = 'names = []'
OURS = "import timm; timm.names.append('slim')"


@pytest.fixture
def site(tmp_path):
    """A site-packages folder with the hook in it."""
    folder = tmp_path / 'site'
    folder.mkdir()
    switch_on(folder)
    return folder


def run(site, program, **packages):
    """Run a program at whose start-up the folder is read, in an environment of nothing but the given packages."""
    for name, text in packages.items():
        (site.parent / name).mkdir()
        (site.parent / name / '__init__.py').write_text(text)
    start = f'import sys, site; before = set(sys.modules); site.addsitedir({str(site)!r})\n'
    env = {**os.environ, 'PYTHONPATH': str(site.parent)}
    command = [sys.executable, '-S', '-c', start + program]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=site)


@pytest.mark.parametrize('program', [
    'import timm',
    'from timm import names',
    'import timm_epfs',  # which imports timm before it is there itself
    'import importlib.util; importlib.util.find_spec("timm"); import timm',
    'import timm; import importlib; importlib.reload(sys.modules["timm_epfs"])',
])
def test_importing_timm_brings_our_names(site, program):
    done = run(site, f'{program}\nprint(sys.modules["timm"].names[0], "timm_epfs" in sys.modules)', timm=TIMM,
               timm_epfs=OURS)
    assert (done.stdout, done.stderr) == ('slim True\n', '')


def test_a_hook_that_is_read_twice_works_once(site):
    """As in virtual environments, whose site-packages Python reads twice, and where two folders have a hook."""
    again = f'site.addsitedir({str(site)!r})'
    done = run(site, f'{again}; import timm; print(timm.names, len([f for f in sys.meta_path if "Timm" in repr(f)]))',
               timm=TIMM, timm_epfs=OURS)
    assert (done.stdout, done.stderr) == ("['slim'] 1\n", '')


def test_a_virtual_environment_of_its_own(tmp_path):
    """The real thing: a new environment, and the names in any of its programs."""
    venv.create(tmp_path / 'env', symlinks=True)
    python = tmp_path / 'env' / 'bin' / 'python'
    command = [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))']
    packages = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    switch_on(packages)
    for name, text in {'timm': TIMM, 'timm_epfs': OURS}.items():
        (packages / f'{name}.py').write_text(text)
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    command = [python, '-c', 'import timm; print(timm.names)']
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("['slim']\n", '')


def test_programs_without_timm_pay_nothing(site):
    """Nothing is imported and no file but the hook is read: a quarter of a millisecond when it was measured."""
    done = run(site, (
        'print(before ^ set(sys.modules))\n'
        'opened = []\n'
        'sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)\n'
        f'site.addsitedir({str(site)!r}); print(opened)\n'
        'import json; print("timm" in sys.modules)'
    ))
    assert (done.stdout, done.stderr) == (f'set()\n{[str(autoload_path(site))]}\nFalse\n', '')


@pytest.mark.parametrize('broken, notice', [
    ('raise RuntimeError("torn")', 'not loaded with timm: RuntimeError: torn\n'),
    ('import gone', "not loaded with timm: ModuleNotFoundError: No module named 'gone'\n"),
    ('1 +', 'not loaded with timm: SyntaxError: '),
])
def test_a_broken_install_breaks_no_program(site, broken, notice):
    done = run(site, 'import timm; print(timm.names)', timm=TIMM, timm_epfs=broken)
    assert (done.stdout, done.returncode) == ('[]\n', 0)
    assert done.stderr.startswith(notice) and done.stderr.count('\n') == 1


def test_after_uninstalling_what_is_left_is_silent(site):
    done = run(site, 'import timm; print(timm.names)', timm=TIMM)
    assert (done.stdout, done.stderr) == ('[]\n', '')


def test_without_timm_and_with_a_broken_one_the_error_is_theirs(site):
    assert "No module named 'timm'" in run(site, 'import timm').stderr.splitlines()[-1]
    assert 'ValueError: theirs' in run(site, 'import timm', timm='raise ValueError("theirs")').stderr.splitlines()[-1]


def test_on_and_off_leave_nothing_behind(tmp_path):
    assert not is_on(tmp_path) and not switch_off(tmp_path)
    assert switch_on(tmp_path) == switch_on(tmp_path) == autoload_path(tmp_path)
    assert is_on(tmp_path) and [path.suffix for path in tmp_path.iterdir()] == ['.pth']
    assert switch_off(tmp_path) and not is_on(tmp_path) and not any(tmp_path.iterdir())


@pytest.mark.parametrize('step', ['pathlib.Path.write_text', 'os.replace'])
def test_site_packages_that_can_not_be_written(tmp_path, monkeypatch, step):
    def fail(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(PruningError, match=r'timm_epfs_autoload.pth can.t be written \(Permission denied\)'):
            switch_on(tmp_path)
    assert not any(tmp_path.iterdir())
    switch_on(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'unlink', fail)
        with pytest.raises(PruningError, match='Permission denied'):
            switch_off(tmp_path)
    assert is_on(tmp_path)


def test_the_shell_switches_the_environment_it_runs_in(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sysconfig.get_path', lambda name: {'purelib': str(tmp_path)}[name])
    said = []
    for state in ('status', 'on', 'on', 'status', 'off', 'off', 'status'):
        assert main(['autoload', state]) == 0
        said.append(capsys.readouterr().out.split()[2])
    assert said == ['off:', 'on', 'on', 'on', 'off:', 'off:', 'off:'] and not any(tmp_path.iterdir())
