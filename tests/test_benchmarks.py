"What the benchmarks promise about themselves: results are kept only from a quiet machine."
import subprocess, sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1]/'benchmarks'

@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common
    return common

@pytest.mark.parametrize('busy,refused', [(0, False), (.1, False), (.11, True), (.98, True)])
def test_write_is_refused_while_something_else_runs(common, monkeypatch, capsys, busy, refused):
    monkeypatch.setattr(common, 'busy_share', lambda: busy)
    monkeypatch.setattr(sys, 'argv', ['growth.py', '--write'])
    if not refused:
        assert common.arguments('x').write
        return
    with pytest.raises(SystemExit) as e: common.arguments('x')
    told = capsys.readouterr().err
    assert e.value.code == 1 and 'at most 10%' in told
    assert f'{busy:.0%} of the processor was busy' in told

def test_without_write_nothing_is_measured(common, monkeypatch):
    monkeypatch.setattr(common, 'busy_share', lambda: pytest.fail('measured'))
    monkeypatch.setattr(sys, 'argv', ['growth.py', '--images', '7'])
    assert common.arguments('x', images=(5, 'some')).images == 7

def test_a_process_at_work_is_seen(common):
    endless = [sys.executable, '-c', 'print("on", flush=True)\nwhile True: pass']
    with subprocess.Popen(endless, stdout=subprocess.PIPE) as other:
        try:
            other.stdout.readline()
            assert 0 < common.busy_share(.5) <= 1
        finally: other.kill()

@pytest.mark.parametrize('ms,mb,reached', [
    (1.19, 15, True), (1.21, 15, False), (.5, 15, True), (1.19, 45, False)])
def test_what_counts_as_linear_and_flat(common, ms, mb, reached):
    "20 % more per image, and 3 KB for each further image; less is no fault."
    import growth
    found = {'split': {1000: dict(ms=1., mb=10.), 11_000: dict(ms=ms, mb=float(mb))}}
    rows, checks = growth.checked(found, [1000, 11_000])
    assert len(rows) == 1 and all(ok for _, _, ok in checks.values()) == reached

@pytest.mark.slow
def test_growth_runs_through():
    command = [sys.executable, str(BENCHMARKS/'growth.py'), '--sizes', '300,600']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'training, an epoch' in done.stdout and '600: MB' in done.stdout
