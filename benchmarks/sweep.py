"Points per minute of `cxr-lab sweep` against a plain sequential papermill loop over the same points; memory and planning of a thousand points."
import os, shutil, statistics, tempfile, time
from pathlib import Path

from common import arguments, report

def loop(plan, work):
    "What one writes first: every notebook of every point, one after the other."
    import papermill
    from cxr_lab.kernels import plain_kernels
    from cxr_lab.report import write_results
    for point in plan.points:
        run = work/point.name
        for path in plan.notebooks:
            stem = Path(path).stem
            (run/stem).mkdir(parents=True)
            papermill.execute_notebook(path, str(run/stem/f'{stem}.ipynb'), dict(point.overrides[stem], run_dir=str(run)), progress_bar=False, kernel_name='python3', language='python', kernel_manager_class=plain_kernels())
        write_results(run)
    return [work/p.name for p in plan.points]

def scores(runs):
    "Test AUROC of every training, in the order of the runs."
    from cxr_lab.runs import read_json
    return [[row['auroc'] for row in read_json(run/'results.json')['rows']] for run in runs]

def a_thousand(work):
    "Seconds to plan 1,000 points of the lessons, and the growth of the scheduler's process, MB, while 1,000 trivial points run after the first 100."
    import nbformat, psutil
    from cxr_lab import sweep as S
    begin = time.perf_counter()
    S.plan_sweep(grid={'03_train.lr': [f'{i/1e4}' for i in range(1, 101)], '03_train.seed': [str(i) for i in range(10)]}, data='phantom')
    planned = time.perf_counter() - begin
    cell = nbformat.v4.new_code_cell("run_dir: str = 'runs/x'\nn: int = 0", metadata={'tags': ['parameters']})
    (work/'nbs').mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell('n + 1')]), work/'nbs/00_trivial.ipynb')
    sizes, finish, me = [], S.finish_point, psutil.Process()
    def watched(*args):
        sizes.append(me.memory_info().rss/1e6)
        return finish(*args)
    S.finish_point = watched
    begin = time.perf_counter()
    S.sweep(S.plan_sweep(nbs=work/'nbs', grid={'n': [str(i) for i in range(1000)]}), work/'thousand')
    return planned, statistics.median(sizes[-100:]), statistics.median(sizes[-100:]) - statistics.median(sizes[100:200]), time.perf_counter() - begin

if __name__ == '__main__':
    a = arguments(__doc__, phantoms=(160, 'training images'), size=(64, 'pixels'), epochs=(4, 'per training'), points=(8, 'learning rates and seeds, an even number'), workers=(2, 'of the sweep'),
                  thousand=(1, '0: without the thousand trivial points'))
    load = round(os.getloadavg()[0], 1)
    work = Path(tempfile.mkdtemp(prefix='cxr_lab-benchmark-'))
    os.environ.update(CXR_LAB_PROGRESS='0')
    from cxr_lab.sweep import plan_sweep, sweep
    plan = plan_sweep(['03_train'], data='phantom', grid={'lr': ['3e-3', '6e-3'], '03_train.seed': [str(i) for i in range(a.points//2)]},
                      params=dict(phantoms=str(a.phantoms), image_size=str(a.size), epochs=str(a.epochs), seeds='1'))
    try:
        rows, seconds, found = [], {}, {}
        def swept(workers):
            out = sweep(plan, work/f'workers{workers}', workers=workers)
            return [out/p.folder for p in plan.points]
        for name, how in [('papermill, one after the other', lambda: loop(plan, work/'plain')), ('cxr-lab sweep, 1 worker', lambda: swept(1)), (f'cxr-lab sweep, {a.workers} workers', lambda: swept(a.workers))]:
            os.environ['CXR_LAB_CACHE'] = str(work/f'cache{len(rows)}')  # nothing that another side has made
            begin = time.perf_counter()
            runs = how()
            seconds[name] = time.perf_counter() - begin
            found[name] = scores(runs)
            executions = len(plan.points)*len(plan.notebooks) if len(rows) == 0 else len(plan.nodes)
            print(f'{name}: {seconds[name]:.0f} s, AUROC {" ".join(f"{x:.4f}" for p in found[name] for x in p)}', flush=True)
            rows.append({'how': name, 'points': len(plan.points), 'executions of notebooks': executions, 'seconds': seconds[name], 'points/minute': 60*len(plan.points)/seconds[name]})
        plain, one, some = seconds
        def difference(how): return max(abs(x - y) for p, q in zip(found[plain], found[how], strict=True) for x, y in zip(p, q, strict=True))
        for how in (one, some):  # a training computes with one thread, so how many there are at a time changes no digit
            assert difference(how) < 1e-6, f'{how} does not measure what {plain} does: AUROC differs by {difference(how):.1e}'
        checks = {f'times as fast with {a.workers} workers': (seconds[plain]/seconds[some], 1.6, seconds[plain]/seconds[some] >= 1.6),
                  'times as fast with 1 worker': (seconds[plain]/seconds[one], 1, seconds[plain]/seconds[one] >= 1)}
        if a.thousand:
            planned, size, growth, took = a_thousand(work)
            checks |= {'seconds to plan 1,000 points of all lessons': (planned, 5, planned < 5), "growth of the scheduler's memory from point 150 to 950 of 1,000, % of its size": (100*growth/size, 10, growth < .1*size)}
            rows.append({'how': '1,000 trivial points, as many workers as fit', 'points': 1000, 'executions of notebooks': 1000, 'seconds': took, 'points/minute': 60000/took})
        report('sweep', 'Sweeps (lessons 00 and 03 on phantoms)', rows, checks, a.write, load=load, phantoms=a.phantoms, size=a.size, epochs=a.epochs, points=a.points, workers=a.workers)
    finally: shutil.rmtree(work, ignore_errors=True)
