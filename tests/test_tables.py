"Tables of sweeps and runs against an independent computation."
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxr_lab.pipeline import UsageError
from cxr_lab.runs import write_json
from cxr_lab.tables import compare_to, summarize, tidy_table, write_table

def test_tables_against_pandas_and_scipy():
    "A made-up sweep with effects of every kind, aggregated by hand."
    from scipy import stats
    rng, rows = np.random.default_rng(0), []
    for lr in (.1, .2, .3):
        for factor in (1, 2):
            for seed in range(4):
                run = f'{lr}-{factor}-{seed}'
                shared = dict(run=run, lr=lr, factor=factor, seed=seed)
                rows += [shared | dict(notebook='00_data', place='', training_seed=None, ran_in='0.1-1-0', metric='n', value=5.)]
                rows += [shared | dict(notebook='01_train', place='', training_seed=None, ran_in=run, metric='score', value=rng.normal() + lr)]
    table = pd.DataFrame(rows).astype({'training_seed': 'Int64'})
    summary = summarize(table)
    train = table[table.notebook == '01_train']
    reference = train.groupby(['lr', 'factor']).value.agg(['count', 'mean', 'std'])
    ours = summary[summary.notebook == '01_train'].set_index(['lr', 'factor'])
    np.testing.assert_allclose(ours[['n', 'mean', 'sd']], reference)
    for k, g in train.groupby(['lr', 'factor']):
        np.testing.assert_allclose(ours.loc[k, ['low', 'high']].astype(float), stats.ttest_1samp(g.value, 0).confidence_interval())
    assert (summary[summary.notebook == '00_data'].n == 1).all()  # shared: one measurement
    differences = compare_to(table, {'lr': .1})
    assert list(differences.notebook) == ['01_train']*2
    wide = train.pivot_table(index=['factor', 'seed'], columns='lr', values='value')
    for row in differences.to_dict('records'):
        test = stats.ttest_rel(wide[row['lr']], wide[.1])
        np.testing.assert_allclose([row['n'], row['difference'], row['p'], row['low'], row['high'], row['baseline']],
                                   [8, (wide[row['lr']] - wide[.1]).mean(), test.pvalue, *test.confidence_interval(), wide[.1].mean()])

def test_overlapping_seeds_count_once():
    rows = [dict(run=f'r{s}', **{'03_train.seed': s}, notebook='03_train', place='seed_*', training_seed=s + i, ran_in=f'r{s}', metric='score', value=float(s + i)) for s in (0, 1) for i in range(3)]
    summary = summarize(pd.DataFrame(rows).astype({'training_seed': 'Int64'}))
    assert summary.n.tolist() == [4] and summary['mean'].tolist() == [1.5]

def test_table_of_any_run_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, lr in enumerate((.1, .2)):
        write_json(f'r{i}/run.json', {'parameters': {'01_train': {'lr': lr, 'epochs': 3}}})
        write_json(f'r{i}/results.json', {})
        write_json(f'r{i}/01_train/status.json', {'id': str(i), 'upstream': {}})
        write_json(f'r{i}/01_train/metrics.json', {'score': lr, 'whether': True, 'name': 'x', 'undefined': None, 'seconds': 5., 'index_seconds': 1., 'images_per_second': 9., 'seconds_tsne': 3})
        write_json(f'r{i}/01_train/fine/seed_3/metrics.json', {'seed': 3, 'score': -lr})
    table = tidy_table(['r0', 'r1'])
    assert list(table) == ['run', '01_train.lr', 'notebook', 'place', 'training_seed', 'ran_in', 'metric', 'value']
    assert table.drop(columns=['notebook', 'ran_in']).fillna(-1).values.tolist() == [[f'r{i}', lr, *row] for i, lr in enumerate((.1, .2)) for row in (['fine/seed_*', 3, 'score', -lr], ['', -1, 'score', lr], ['', -1, 'whether', 1.])]
    for name in ('a.csv', 'b.csv', 'a.parquet', 'b.parquet'): write_table(table, name)
    for kind in ('csv', 'parquet'): assert Path(f'a.{kind}').read_bytes() == Path(f'b.{kind}').read_bytes()
    with pytest.raises(UsageError, match='can be written'): write_table(table, 'a.xlsx')
    with pytest.raises(FileNotFoundError, match='neither a completed run nor a sweep'): tidy_table(['r0/01_train'])
