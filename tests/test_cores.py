"One process per core, one thread in each: order, equality, errors, interruption, and nobody left behind."
import gc, os, re, signal, subprocess, sys, threading, time
from pathlib import Path

import numpy as np
import psutil
import pytest
from joblib.externals.loky import ProcessPoolExecutor

from cxr_lab import cores as module
from cxr_lab.cores import cores, fit_workers, free_memory, in_processes, in_threads, no_search_for_garbage, one_thread

REPO = Path(module.__file__).parent.parent

def whose(item): return os.getpid(), item

def threads(_):
    import cv2, torch
    from threadpoolctl import threadpool_info
    (np.eye(200) @ np.eye(200)).sum()
    pools = {p['num_threads'] for p in threadpool_info() if p['user_api'] == 'blas'}
    return torch.get_num_threads(), cv2.getNumThreads(), pools, cores()

def test_cores_are_counted_or_said(monkeypatch):
    monkeypatch.delenv('CXR_LAB_CORES', raising=False)
    assert 1 <= cores() <= os.cpu_count()
    monkeypatch.setenv('CXR_LAB_CORES', '7')
    assert cores() == 7
    for bad in ('0', '-1', 'two', '1.5'):
        monkeypatch.setenv('CXR_LAB_CORES', bad)
        with pytest.raises(ValueError, match='CXR_LAB_CORES'): cores()

def test_memory_limits_the_workers_unless_their_number_is_said(monkeypatch):
    monkeypatch.setenv('CXR_LAB_CORES', '8')
    monkeypatch.setattr(module, 'free_memory', lambda: 10e9)
    assert fit_workers(20) == 8 and fit_workers(3) == 3
    assert fit_workers(20, memory=2e9) == 4 and fit_workers(20, memory=50e9) == 1
    assert fit_workers(20, workers=6, memory=2e9) == 6 and fit_workers(2, workers=6) == 2
    with pytest.raises(ValueError, match='workers=0'): fit_workers(20, workers=0)

def test_free_memory_is_what_the_system_says():
    assert 0 < free_memory() <= psutil.virtual_memory().total

def test_one_thread_inside_and_as_before_after():
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ZeroDivisionError), one_thread():
            assert torch.get_num_threads() == 1
            1 / 0
        assert torch.get_num_threads() == 3
    finally: torch.set_num_threads(before)

@pytest.mark.parametrize('was', [True, False])
def test_garbage_is_looked_for_again_after_the_block(was):
    before = gc.isenabled()
    (gc.enable if was else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError), no_search_for_garbage():
            assert not gc.isenabled()
            1 / 0
        assert gc.isenabled() == was
    finally: (gc.enable if before else gc.disable)()

@pytest.mark.skipif(sys.platform != 'linux', reason='of glibc')
def test_freed_memory_is_kept():
    code = """
import resource, numpy as np
from cxr_lab.cores import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10): np.ones(4 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
returned = faults()
keep_freed_memory()
faults()
print(returned, faults())
"""
    env = os.environ | {'PYTHONPATH': str(Path(module.__file__).parent.parent)}
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.split())
    assert kept < returned / 10

@pytest.mark.parametrize('workers', [1, 2])
def test_results_are_in_order_and_computed_where_they_should_be(workers):
    found = in_processes(whose, range(7), 'items', workers)
    assert [item for _, item in found] == list(range(7))
    assert ({pid for pid, _ in found} == {os.getpid()}) == (workers == 1)

def test_nothing_to_do(): assert in_processes(whose, [], 'nothing') == []

@pytest.mark.parametrize('workers', [1, 2])
def test_each_job_has_one_thread(workers):
    for torch_threads, cv2_threads, blas, inside in in_processes(threads, range(2), 'threads', workers):
        assert torch_threads == cv2_threads == 1 and blas == {1}
        assert workers == 1 or inside == 1, 'a worker starts no workers of its own'

def test_a_mapped_array_stays_mapped(tmp_path):
    np.save(tmp_path/'a.npy', np.arange(12.).reshape(3, 4))
    whole = np.load(tmp_path/'a.npy', mmap_mode='r')
    for a in (whole, whole[1:], whole.T, np.asarray(whole)):
        kinds = in_processes(lambda i: (isinstance(a, np.memmap), a.tolist()), range(2), 'mapped', 2)
        assert kinds == [(a is whole, a.tolist())] * 2

def test_functions_of_a_notebook_and_what_they_close_over_travel():
    large = np.arange(500_000)  # beyond joblib's bound: travels as a file
    assert in_processes(lambda i: int(large[i]), [3, 499_999], 'closures', 2) == [3, 499_999]

def test_the_bar_moves_while_jobs_run(tmp_path, monkeypatch):
    monkeypatch.setenv('CXR_LAB_PROGRESS', '1')
    seen, real = [], module.progress
    def recorded(*args):
        bar = real(*args)
        refresh = bar.refresh
        bar.refresh = lambda: (seen.append(bar.n), refresh())
        return bar
    monkeypatch.setattr(module, 'progress', recorded)
    in_processes(lambda i: time.sleep(2.5), range(2), 'sleeping', 2, done=lambda i: .25)
    assert .5 in seen and seen[-1] == 2, 'two jobs, each a quarter done'

IN_A_CELL = '''import time
from cxr_lab.cores import in_processes
begun = time.time()
in_processes(lambda i: time.sleep(4), range(2), 'training', 2, done=lambda i: min(.75, (time.time() - begun) / 8));'''

def test_in_jupyterlab_the_bar_moves_while_worker_processes_are_busy(monkeypatch):
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook
    monkeypatch.delenv('CXR_LAB_PROGRESS')
    monkeypatch.setenv('JPY_SESSION_NAME', 'x.ipynb')  # as JupyterLab tells its kernels
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, [str(REPO), os.environ.get('PYTHONPATH')])))
    nb = new_notebook(cells=[new_code_cell(IN_A_CELL)])
    NotebookClient(nb, kernel_name='python3', timeout=120).execute()
    said = ''.join(o.text for o in nb.cells[0].outputs if o.get('name') == 'stdout')
    shares = [int(share) for share in re.findall(r'training: +(\d+)%', said)]
    assert shares[0] == 0 and shares[-1] == 100 and len(set(shares)) > 3, said

def test_jobs_run_in_the_folder_of_the_caller(tmp_path, monkeypatch):
    in_processes(whose, range(2), 'the workers start here', 2)
    monkeypatch.chdir(tmp_path)
    assert set(in_processes(lambda i: os.getcwd(), range(2), 'folders', 2)) == {os.path.realpath(tmp_path)}

def test_an_error_in_a_worker_is_raised_here_and_the_workers_can_be_used_again():
    with pytest.raises(ZeroDivisionError): in_processes(lambda i: 1 / (i - 2), range(4), 'fails', 2)
    assert in_processes(whose, [1, 2], 'again', 2)[0][1] == 1

def test_a_failure_leaves_no_thread_that_stumbles_over_the_jobs_that_waited(monkeypatch):
    "loky's thread looked for jobs that the end had taken away."
    stumbled = []
    monkeypatch.setattr(threading, 'excepthook', stumbled.append)
    def job(i):
        if i == 20: raise ZeroDivisionError
        time.sleep(.0005)
    with pytest.raises(ZeroDivisionError): in_processes(job, range(300), 'failing', 2)
    assert stumbled == []

def test_a_worker_that_dies_is_an_error():
    with pytest.raises(Exception, match='terminated|died'):
        in_processes(lambda i: os.kill(os.getpid(), signal.SIGKILL), range(2), 'dies', 2)
    assert [i for _, i in in_processes(whose, range(2), 'again', 2)] == [0, 1]

SCRIPT = """
import os, sys, time
from pathlib import Path
from cxr_lab.cores import in_processes
folder = Path(sys.argv[1])
def job(i):
    (folder/str(os.getpid())).touch()
    time.sleep(60)
if __name__ == '__main__':
    try: in_processes(job, range(4), 'sleeping', 2)
    except KeyboardInterrupt: sys.exit(7)
"""

@pytest.mark.skipif(os.name == 'nt', reason='the test sends POSIX signals')
@pytest.mark.parametrize('number, code', [(signal.SIGINT, 7), (signal.SIGKILL, -signal.SIGKILL)])
def test_when_the_process_ends_its_workers_end(tmp_path, number, code):
    (tmp_path/'script.py').write_text(SCRIPT)
    (tmp_path/'pids').mkdir()
    env = os.environ | {'PYTHONPATH': str(Path(module.__file__).parent.parent)}
    run = subprocess.Popen([sys.executable, tmp_path/'script.py', tmp_path/'pids'], env=env, stderr=subprocess.DEVNULL)
    try:
        wait(lambda: len(list((tmp_path/'pids').iterdir())) == 2)
        run.send_signal(number)
        assert run.wait(30) == code
        workers = [int(p.name) for p in (tmp_path/'pids').iterdir()]
        wait(lambda: not any(alive(pid) for pid in workers))
    finally: run.kill()

@pytest.mark.skipif(os.name == 'nt', reason='the test sends POSIX signals')
def test_interrupted_while_jobs_are_still_handed_over_the_workers_end(monkeypatch, tmp_path):
    submit, handed = ProcessPoolExecutor.submit, []
    def interrupted(pool, *args):
        handed.append(submit(pool, *args))
        if len(handed) == 2:
            wait(lambda: len(list(tmp_path.iterdir())) == 2)
            signal.raise_signal(signal.SIGINT)
        return handed[-1]
    def job(i):
        (tmp_path/str(os.getpid())).touch()
        time.sleep(100)
    monkeypatch.setattr(ProcessPoolExecutor, 'submit', interrupted)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt): in_processes(job, range(4), 'sleeping', 2)
    assert time.monotonic() - begun < 90, 'the jobs were waited for'
    wait(lambda: not any(alive(int(p.name)) for p in tmp_path.iterdir()))

def alive(pid):
    try: return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return False

def wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.05)


# Threads

@pytest.mark.parametrize('workers', [1, 3])
def test_threads_return_in_order_and_each_computes_on_one_core(workers):
    import torch
    before = torch.get_num_threads()
    def slow(item): time.sleep(.02 * (5 - item)); return item, threading.get_ident(), torch.get_num_threads()
    found = in_threads(slow, range(5), workers=workers)
    assert [i for i, _, _ in found] == list(range(5)) and {n for _, _, n in found} == {1}
    assert len({thread for _, thread, _ in found}) == workers and torch.get_num_threads() == before

def test_threads_use_the_cores_there_are(monkeypatch):
    monkeypatch.setenv('CXR_LAB_CORES', '4')
    together = threading.Barrier(4)  # passes only if four are at work at once
    assert in_threads(lambda i: together.wait(60) is not None, range(4)) == [True] * 4
    assert in_threads(whose, []) == []

def test_an_error_in_a_thread_is_raised_here_and_what_waits_is_not_begun():
    begun = []
    def bad(item):
        begun.append(item)
        raise RuntimeError(f'item {item} is bad')
    with pytest.raises(RuntimeError, match='item 0 is bad'): in_threads(bad, range(1000), workers=1)
    assert len(begun) < 1000
