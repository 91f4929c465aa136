"Results that agree with their predictions, and notebooks that are published only as they were run."
import base64, io
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_lab import report
from cxr_lab.report import (RULES, PublishError, publish, readme_in_sync, readme_text, result_rows, results_markdown, results_table, runs_table,
                            write_readme, write_results)
from cxr_lab.runs import Step, read_json, write_json
from cxr_lab.scores import METRICS

v4 = nbformat.v4


def trained(step, experiment='baseline', seed=0, sub='', label=None, **changes):
    "Leaves what a training leaves, computed without scikit-learn."
    rng = np.random.default_rng(seed)
    label = np.tile([0, 1, 1], 20) if label is None else label
    probability = 1/(1 + np.exp(-rng.normal(2*label - 1, 1)))
    df = pd.DataFrame(dict(path=[f'{i:03}.jpeg' for i in range(len(label))], patient='p', split='test', label=label, probability=probability))
    extra = df.head(5).assign(path=[f'v{i}' for i in range(5)], split='validation', label=0, probability=.99)  # must not count
    df = step.write_predictions(pd.concat([df, extra]), f'{sub}seed_{seed}')
    df = df[df.split == 'test']
    metrics = dict(experiment=experiment, seed=seed, threshold=.7, n=len(df))
    for rule, threshold in [('0.5', .5), ('validation', .7)]:
        p, y = df.probability.to_numpy() >= threshold, df.label.to_numpy() == 1
        tp, fp, tn, fn = (p & y).sum(), (p & ~y).sum(), (~p & ~y).sum(), (~p & y).sum()
        ratio = lambda a, b: a/b if b else None
        values = dict(recall=ratio(tp, tp + fn), precision=ratio(tp, tp + fp), accuracy=(tp + tn)/len(y), f1=ratio(2*tp, 2*tp + fp + fn), specificity=ratio(tn, tn + fp))
        both = y.any() and (~y).any()
        values['balanced_accuracy'] = (values['recall'] + values['specificity'])/2 if both else None
        pairs = df.probability.to_numpy()[y][:, None] - df.probability.to_numpy()[~y]
        values['auroc'] = ((pairs > 0) + .5*(pairs == 0)).mean() if both else None
        metrics |= {f'test_{k}{RULES[rule]}': v for k, v in values.items()}
    step.write_metrics({k: v for k, v in (metrics | changes).items() if v != 'drop'}, f'{sub}seed_{seed}')

@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = Step('runs/r', '03_train', dict(epochs=8, seeds=2))
    for seed in (0, 1): trained(step, seed=seed)
    step.record(dataset=dict(kind='phantom', fingerprint='abc', counts=dict(train=3)))
    return Path('runs/r')


# Results

def test_rows_and_provenance(run):
    step = Step(run, '04_augment', dict(where=str(run.resolve())))
    trained(step, 'augmented'); trained(step, 'geometric', sub='geometric/')
    Step(run, '00_data', dict(data=str(run.resolve()), run_dir='x'))
    Step(run, '07_segment', {}).write_metrics(dict(dice=.9), 'seed_0')  # no classifier
    write_json(run/'03_train'/'status.json', dict(id='a', upstream={}, seconds=12.))
    results = read_json(write_results(run))
    assert {(r['experiment'], r['seed'], r['threshold_rule'], r['threshold']) for r in results['rows']} == {
        (e, s, rule, t) for e, s in [('baseline', 0), ('baseline', 1), ('augmented', 0), ('geometric', 0)] for rule, t in [('0.5', .5), ('validation', .7)]}
    assert all(list(r) == ['experiment', 'seed', 'threshold_rule', 'threshold', *METRICS, 'n'] for r in results['rows'])
    p = results['provenance']
    assert (p['run'], p['seeds'], p['seconds'], p['dataset']['fingerprint'], p['outdated']) == ('r', [0, 1], {'03_train': 12.}, 'abc', [])
    assert p['parameters'] == {'03_train': {'epochs': 8, 'seeds': 2}, '04_augment': {'where': 'r'}, '00_data': {'data': 'r'}, '07_segment': {}} and p['data'] == 'r'
    assert str(run.resolve()) not in (run/'results.json').read_text()
    assert results['quoted'] == {}, 'none of these lessons has left what the front page tells'

def test_what_the_front_page_tells_is_quoted_from_the_lessons(run):
    Step(run, '01_explore', {}).write_metrics(dict(proportion_auroc_train=.9, proportion_auroc_test=.6, n_images=3))
    Step(run, '03_train', {}).write_metrics(dict(val_accuracy_mean=.97))
    quoted = read_json(write_results(run))['quoted']
    assert quoted == {'01_explore': {'proportion_auroc_train': .9, 'proportion_auroc_test': .6}, '03_train': {'val_accuracy_mean': .97}}

@pytest.mark.parametrize('metric', [f'test_{m}{suffix}' for m in METRICS[:-1] for suffix in RULES.values()] + ['test_auroc'])
def test_a_metric_that_disagrees_is_refused(run, metric):
    metrics = read_json(run/'03_train'/'seed_1'/'metrics.json')
    write_json(run/'03_train'/'seed_1'/'metrics.json', metrics | {metric: metrics[metric] + 5e-6})
    with pytest.raises(ValueError, match='03_train/seed_1: .* but its predictions.csv gives'): write_results(run)
    assert not (run/'results.json').exists()
    write_json(run/'03_train'/'seed_1'/'metrics.json', metrics | {metric: metrics[metric] + 5e-7})
    write_results(run)

@pytest.mark.parametrize('changes,match', [(dict(test_f1='drop'), "'test_f1' is missing"), (dict(threshold='drop'), "'threshold' is missing"), (dict(n=59), 'n is 59, predictions.csv has 60'),
                                           (dict(test_auroc=None), 'auroc .* is None'), (dict(threshold=.2), 'at threshold rule validation')])
def test_incomplete_or_inconsistent_metrics_name_the_folder(run, changes, match):
    trained(Step(run, '03_train', {}), seed=1, **changes)
    with pytest.raises(ValueError, match='03_train/seed_1: .*' + match): result_rows(run)

def test_the_same_experiment_and_seed_twice_is_refused(run):
    trained(Step(run, '04_augment', {}), 'baseline')
    with pytest.raises(ValueError, match="03_train/seed_0 and 04_augment/seed_0 are both experiment 'baseline'"): result_rows(run)

def test_undefined_metrics_are_none(run):
    trained(Step(run, '04_augment', {}), 'one class', label=np.ones(12, int))
    row = [r for r in result_rows(run) if r['experiment'] == 'one class'][0]
    assert row['auroc'] is None and row['specificity'] is None and row['recall'] > 0

def test_outdated_steps_are_left_out_and_named(run):
    write_json(run/'03_train'/'status.json', dict(id='b', upstream={'00_data': 'gone'}, seconds=1.))
    results = read_json(write_results(run))
    assert results['rows'] == [] and results['provenance']['outdated'] == ['03_train']


# Tables

def test_mean_and_deviation(run):
    results = read_json(write_results(run))
    table = results_table(results).set_index('threshold_rule')
    f1 = [r['f1'] for r in results['rows'] if r['threshold_rule'] == '0.5']
    assert table.loc['0.5', 'f1'] == pytest.approx(np.mean(f1)) and table.loc['0.5', 'f1_sd'] == pytest.approx(np.std(f1, ddof=1)) and table.loc['0.5', 'seeds'] == 2
    text = results_markdown(results, metrics=('f1', 'auroc'), rules=('0.5',))
    assert text.splitlines()[2].startswith(f'| baseline | 0.5 | 2 | {np.mean(f1):.4f} ± {np.std(f1, ddof=1):.4f} |')
    assert text.splitlines()[0] == '| experiment | threshold | seeds | F1 | AUROC |' and 'generated phantoms' in text
    real = {'provenance': {'data': 'kermany', 'dataset': {'kind': 'kermany'}}, 'rows': results['rows'][:2]}
    assert 'phantom' not in results_markdown(real) and '±' not in results_markdown(real)

def test_order_and_undefined_in_markdown():
    row = dict(seed=0, threshold_rule='0.5', threshold=.5, n=3) | dict.fromkeys(METRICS, None)
    results = {'provenance': {'data': None, 'dataset': None}, 'rows': [dict(row, experiment=e) for e in 'ab']}
    lines = results_markdown(results, experiments=['b', 'c', 'a']).splitlines()
    assert [line.split(' | ')[0] for line in lines[2:]] == ['| b', '| a'] and 'undefined' in lines[2]

def test_runs_side_by_side(run):
    write_results(run)
    trained(Step('runs/s', '03_train', dict(epochs=4, seeds=2))); write_results('runs/s')
    write_results(Path(Step('runs/empty', '00_data', {}).run))
    table = runs_table([run, 'runs/s', 'runs/empty'])
    assert table.run.tolist() == ['runs/r']*2 + ['runs/s']*2 + ['runs/empty'] and table['03_train.epochs'].tolist()[:4] == [8, 8, 4, 4]
    assert '03_train.seeds' in table and table.f1.notna().sum() == 4
    assert '03_train.seeds' not in runs_table([run, 'runs/s'])


# Publishing

def out(text='0.9', name='stdout'): return v4.new_output('stream', name=name, text=text)
def show(**data): return v4.new_output('display_data', data={k.replace('__', '/'): v for k, v in data.items()})

def write_source(stem='03_train', code=('a = 1', 'a')):
    cells = [v4.new_markdown_cell('# Title', id='title')] + [v4.new_code_cell(c, id=f'c{i}', metadata={'tags': ['parameters']} if i == 0 else {}) for i, c in enumerate(code)]
    Path('nbs').mkdir(exist_ok=True)
    nbformat.write(v4.new_notebook(cells=cells, metadata={'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}}), f'nbs/{stem}.ipynb')

def write_executed(*outputs, stem='03_train', code=('a = 1', 'a'), prose='# Title', count=True):
    timing = {'papermill': {'duration': 1.}}
    cells = [v4.new_markdown_cell(prose, metadata=timing), v4.new_code_cell(code[0], metadata=timing | {'tags': ['parameters']}, execution_count=1),
             v4.new_code_cell('a = 2', metadata=timing | {'tags': ['injected-parameters']}, execution_count=2)]
    cells += [v4.new_code_cell(c, metadata=timing, execution_count=i + 3 if count else None) for i, c in enumerate(code[1:])]
    cells[-1].outputs = list(outputs)
    nbformat.write(v4.new_notebook(cells=cells, metadata=timing), f'runs/r/{stem}/{stem}.ipynb')
    write_json(f'runs/r/{stem}/status.json', dict(id='a', upstream={}, seconds=1.))

def test_publish_moves_outputs_only(run):
    write_source(); write_source('05_compare')
    write_executed(out(), v4.new_output('execute_result', data={'text/plain': '1', 'image/png': 'aGk='}, execution_count=3), prose='# An older title')
    assert publish(run) == {'published': ['03_train'], 'missing': ['05_compare']}
    nb = nbformat.read('nbs/03_train.ipynb', 4)
    assert [(c.id, c.source) for c in nb.cells] == [('title', '# Title'), ('c0', 'a = 1'), ('c1', 'a')]
    assert [c.get('execution_count') for c in nb.cells] == [None, 1, 2] and nb.cells[2].outputs[1].execution_count == 2
    assert 'papermill' not in Path('nbs/03_train.ipynb').read_text() and nb.metadata.kernelspec.name == 'python3' and nb.cells[1].metadata == {'tags': ['parameters']}
    assert read_json('nbs/results.json') == read_json(run/'results.json') and len(read_json('nbs/results.json')['rows']) == 4

@pytest.mark.parametrize('output,match', [
    (v4.new_output('error', ename='ValueError', evalue='x', traceback=[]), 'error: ValueError'),
    (out('UserWarning: x\n', 'stderr'), 'text on stderr: UserWarning: x'),
    (out('does not hold here: wider is healthier\n'), 'a sentence that is not true: .*wider is healthier'),
    *[(out(f'see {p}x'), 'a path of this machine') for p in ('/home/me/', '/work/', '/root/', '/tmp/', '/Users/me/', 'C:\\Users\\me\\', "'/var/lib/")],
    (show(text__html='<a href="/home/me/x">'), 'a path of this machine'),
    (show(**{'image/svg+xml': '<svg>/tmp/x/</svg>'}), 'a path of this machine'),
    (show(**{'application/json': {'a': ['/tmp/x/']}}), 'a path of this machine'),
    (show(**{'application/vnd.jupyter.widget-view+json': {'model_id': 'x'}, 'text/plain': 'x'}), 'a widget'),
    (show(image__png='A'*3_100_000), 'MB, the limit is 3.0 MB'),
])
def test_unfit_outputs_stop_everything(run, output, match):
    for stem in ('02_model', '03_train'):
        (run/stem).mkdir(exist_ok=True); write_source(stem); write_executed(out(), stem=stem)
    write_executed(output)
    before = {p.name: p.read_bytes() for p in Path('nbs').iterdir()}
    with pytest.raises(PublishError, match=f'03_train: .*{match}'): publish(run)
    assert {p.name: p.read_bytes() for p in Path('nbs').iterdir()} == before

def picture(side, alpha=255, seed=0):
    "A smooth picture with some noise, as base64, and its pixels."
    rng, y, x = np.random.default_rng(seed), *np.mgrid[:side, :side] / side
    pixels = np.stack([255 * y, 255 * x, 127 * (x + y), np.full_like(x, alpha)], -1)
    pixels[..., :3] += rng.normal(0, 4, (side, side, 1))
    pixels = pixels.clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG', compress_level=1)
    return base64.b64encode(file.getvalue()).decode(), pixels

def seen(output): return np.asarray(Image.open(io.BytesIO(base64.b64decode(output.data['image/png']))).convert('RGB')).astype(int)

@pytest.mark.parametrize('limit', ['as it is', 'nothing lost', 'palettes'])
def test_pictures_become_smaller_only_as_far_as_needed(run, monkeypatch, limit):
    pictures = [picture(n) for n in (40, 200, 120)]
    write_source()
    write_executed(*(show(image__png=p) for p, _ in pictures))
    total = sum(len(p) for p, _ in pictures)
    monkeypatch.setattr(report, 'MAX_NOTEBOOK', {'as it is': total + 5000, 'nothing lost': total * .96, 'palettes': total * .75}[limit])
    publish(run)
    outputs = nbformat.read('nbs/03_train.ipynb', 4).cells[2].outputs
    exact = [np.array_equal(seen(o), pixels[..., :3]) for o, (_, pixels) in zip(outputs, pictures)]
    if limit == 'as it is': assert [o.data['image/png'] for o in outputs] == [p for p, _ in pictures]
    assert exact[0] and (all(exact) if limit != 'palettes' else not exact[1]), exact
    assert Path('nbs/03_train.ipynb').stat().st_size < report.MAX_NOTEBOOK
    for o, (_, pixels) in zip(outputs, pictures): assert np.abs(seen(o) - pixels[..., :3]).mean() < 6

def test_what_shines_through_is_white(run, monkeypatch):
    png, pixels = picture(60, alpha=0)
    assert (seen(show(image__png=report._smaller(png, False))) == 255).all()

@pytest.mark.parametrize('output', [out('runs/default/home/x https://example.org/home/x/ 1/tmp/2 a/tmp/b'), show(image__png='/tmp/home/work/'), show(text__plain='and/or/')])
def test_harmless_outputs_pass(run, output):
    write_source(); write_executed(output)
    assert publish(run)['published'] == ['03_train']

@pytest.mark.parametrize('code', [('a = 1', 'b'), ('a = 3', 'a'), ('a = 1', 'a', 'a'), ('a = 1',)])
def test_changed_code_is_refused(run, code):
    write_source(code=code); write_executed(out())
    with pytest.raises(PublishError, match='03_train: changed since this run'): publish(run)

def test_options_of_a_cell_are_no_code(run):
    write_source(code=('a = 1', '#| fig-alt: "new"\n#| fig-cap: "newer"\na')); write_executed(out(), code=('#| hide\na = 1', '#| fig-alt: "old"\na'))
    assert publish(run)['published'] == ['03_train']
    cell = nbformat.read('nbs/03_train.ipynb', 4).cells[2]
    assert cell.source.startswith('#| fig-alt: "new"') and cell.outputs == [out()]

@pytest.mark.parametrize('source,code', [('#| export\n#| fig-alt: "x"\na\n#| b', 'a\n#| b'), ('#| hide', ''), ('#|hide\n\na', '\na'), ('# a\n#| b', '# a\n#| b'), (' #| a', ' #| a'), ('#a', '#a'),
                                         ('s = """\n#| x\n"""', 's = """\n#| x\n"""'), ('', '')])
def test_result_code(source, code):
    injected = v4.new_code_cell('x', metadata={'tags': ['injected-parameters']})
    assert report.result_code(v4.new_notebook(cells=[v4.new_markdown_cell('#| a'), injected, v4.new_code_cell(source)])) == [code]

def test_incomplete_outdated_or_wrong_runs_are_refused(run):
    write_source()
    with pytest.raises(PublishError, match='has no completed notebook'): publish(run)
    write_executed(out(), count=False)
    with pytest.raises(PublishError, match="'a' was not executed"): publish(run)
    write_executed(out())
    write_json(run/'03_train'/'status.json', dict(id='a', upstream={'00_data': 'gone'}, seconds=1.))
    with pytest.raises(PublishError, match='outdated: 00_data'): publish(run)
    write_executed(out())
    metrics = read_json(run/'03_train'/'seed_0'/'metrics.json')
    write_json(run/'03_train'/'seed_0'/'metrics.json', metrics | dict(test_f1=.1234))
    with pytest.raises(ValueError, match='f1 at threshold'): publish(run)
    assert not nbformat.read('nbs/03_train.ipynb', 4).cells[2].outputs and not Path('nbs/results.json').exists()


# README

def write_index(*cells):
    Path('nbs').mkdir(exist_ok=True)
    nbformat.write(v4.new_notebook(cells=list(cells)), 'nbs/index.ipynb')

def code(source, *outputs): return v4.new_code_cell(source, outputs=list(outputs), execution_count=1)

def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_index(v4.new_markdown_cell('# Läb\n\n![p](images/p.png) [a](00_data.ipynb#x) [b](https://x.org/a) [c](#d) [l](../LICENSE) <img width="9" src="images/q.png">\n\n```sh\necho [x](y)\n```'),
                code('#| echo: false\nsecret_code()', show(text__markdown='| F1 |\n| --- |\n| .9 |', text__plain='<M>')),
                code('#| label: x\nprint(1)', out('1\n'), out('noise', 'stderr')), code('#| hide\nhidden()', out('hidden')), code('#| include: false\nhidden()', out('hidden')),
                code('#| output: false\nvisible()', out('gone')), code('#| hide_line\n2', v4.new_output('execute_result', data={'text/plain': '2'})))
    assert not readme_in_sync()
    write_readme()
    text = Path('README.md').read_text(encoding='utf-8')
    assert text.startswith('<!-- ') and '\n# Läb\n' in text
    for part in ['![p](nbs/images/p.png)', '[a](nbs/00_data.ipynb#x)', '[b](https://x.org/a)', '[c](#d)', '[l](LICENSE)', '<img width="9" src="nbs/images/q.png">', 'echo [x](y)', '\n| F1 |\n| --- |\n| .9 |\n',
                 '```python\nprint(1)\n```\n\n```text\n1\n```', '```python\nvisible()\n```', '```text\n2\n```']: assert part in text, part
    for part in ['secret_code', 'hidden', 'noise', 'gone', '#|', '<M>']: assert part not in text, part
    assert readme_in_sync()
    Path('README.md').write_text(text + 'x', encoding='utf-8')
    assert not readme_in_sync()

def test_readme_needs_pictures_as_files_and_no_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output, match in [(show(image__png='aGk=', text__plain='<Figure>'), 'save the picture'), (v4.new_output('error', ename='KeyError', evalue='', traceback=[]), 'error output: KeyError')]:
        write_index(code('x', output))
        with pytest.raises(ValueError, match=match): readme_text()
