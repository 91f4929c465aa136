"The rendered site: every page is made without a warning, every link holds, and a phone can show it."
import re, shutil

import numpy as np
import pytest
import site_check


@pytest.fixture(scope='module')
def site(once):
    pytest.importorskip('smalldocs', reason='smalldocs comes with the development requirements')
    def make(folder):
        site_check.stage(folder/'staging')
        site_check.render(folder/'staging')
    return once('site', make)/'staging'/'_docs'

def test_links_anchors_and_pictures_hold(site): assert site_check.broken_links(site) == []

def test_every_notebook_is_a_page_in_the_sidebar(site):
    pages = {path.as_posix() for path in site_check.notebooks()}
    listed = site_check.sidebar()
    assert set(listed) == pages and len(listed) == len(pages)
    lessons = [page for page in listed if page[4].isdigit()]
    assert lessons == sorted(lessons), 'lessons stand in their order'
    assert all((site/page).with_suffix('.html').is_file() for page in pages) and (site/'index.html').is_file()

def test_the_code_of_the_lessons_is_shown(site):
    text = (site/'nbs'/'00_data.html').read_text(encoding='utf-8')
    text = text.replace('<code>#| export</code>', '')  # the lesson says once what that means
    assert 'patient_of' in text and '#| export' not in text and 'default_exp' not in text

def test_what_readers_are_used_to(site):
    "Folding, copying, search, both themes, the way on and back, a table of contents; and solutions that are not given away at once."
    pages = [page for page in site_check.sidebar() if page != 'nbs/index.ipynb']
    for page in pages:
        text = (site/page).with_suffix('.html').read_text(encoding='utf-8')
        if page not in ('nbs/lab/api.ipynb', 'nbs/lab/teaching.ipynb'): assert 'class="code-fold"' in text and 'code-copy-button' in text, page  # those show no code
        for part in ('quarto-color-scheme-toggle', 'darkly', 'id="TOC"', 'nav-page-previous'): assert part in text, f'{page}: {part}'
        assert 'nav-page-next' in text or page == pages[-1], page
        assert 'https://cdn' not in text and '\\(' not in re.sub(r'<(code|pre|script).*?</\1>', '', text, flags=re.S), f'{page}: formulas need no network'
        if page[4].isdigit():
            for k in (1, 2, 3): assert text.index('id="exercises"') < text.index(f'href="solutions.html#{page[4:6]}-{k}"'), f'{page}: exercise {k} leads to its solution'
    assert (site/'search.json').is_file()

def test_in_a_browser_on_desktop_and_phone(site):
    if not site_check.chromium(): pytest.skip('no Chromium here')
    assert site_check.seen_in_browser(site) == []

def test_broken_pages_are_found(site, tmp_path):
    copy = tmp_path/'site'
    shutil.copytree(site, copy)
    (copy/'bad.html').write_text('<p id="here"></p><a href="#here"></a><a href="#gone"></a><a href="nowhere.html"></a><a href="nbs/00_data.html#gone"></a><img src="x.png">'
                                 '<a href="https://example.org/x"></a><img src="nbs/images/pipeline.png">')
    (copy/'heavy.html').write_text('x' * (site_check.MAX_PAGE + 1))
    problems = site_check.broken_links(copy)
    assert [p.split(': ')[0] for p in problems] == ['bad.html']*5 + ['heavy.html']
    assert [word in p for p, word in zip(problems, ['2 of 2 pictures have no alternative text', '#gone', 'nowhere.html', '00_data.html#gone', 'x.png', 'MB'])] == [True]*6

def test_broken_pages_are_seen(tmp_path):
    if not site_check.chromium(): pytest.skip('no Chromium here')
    (tmp_path/'wide.html').write_text('<meta name="viewport" content="width=device-width"><main><div style="width: 900px; background: red">x</div></main>'
                                      '<img src="gone.png"><script>nothing()</script>')
    (tmp_path/'fine.html').write_text('<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><main>'
                                      '<div style="overflow-x: auto"><div style="width: 900px">x</div></div></main>')
    with site_check.Browser(tmp_path) as browser:
        text = '\n'.join(browser.open('wide.html', 390))
        assert 'beyond the edge' in text and 'gone.png' in text and 'nothing is not defined' in text
        assert browser.open('fine.html', 390) == [] and browser.open('fine.html', 1280) == []

def test_readme_is_in_step_with_the_index():
    from cxr_lab.report import readme_in_sync
    assert readme_in_sync(site_check.ROOT/'nbs'/'index.ipynb', site_check.ROOT/'README.md'), 'run `python .ci/readme.py`'

def test_readme_shows_the_published_results():
    from cxr_lab.report import results_table
    from cxr_lab.runs import read_json
    table = results_table(read_json(site_check.ROOT/'nbs'/'results.json'))
    readme = (site_check.ROOT/'README.md').read_text(encoding='utf-8')
    for row in table.itertuples():
        for metric in ('recall', 'precision', 'accuracy', 'f1', 'specificity', 'auroc'):
            mean, sd = getattr(row, metric), getattr(row, metric + '_sd')
            assert f'{mean:.3f}' + ('' if np.isnan(sd) else f' ± {sd:.3f}') in readme, 'run `python .ci/readme.py`'

def test_every_public_name_is_in_the_list_of_functions():
    import ast, nbformat
    output = nbformat.read(site_check.ROOT/'nbs'/'lab'/'api.ipynb', 4).cells[-1].outputs[0]['data']['text/markdown']
    for path in sorted((site_check.ROOT/'cxr_lab').glob('[!_]*.py')):
        part = re.search(rf'^## {path.stem}\n(.*?)(?=^## |\Z)', output, re.M | re.S)
        tree = ast.parse(path.read_text(encoding='utf-8'))
        public = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__')
        built = [n for n in tree.body if getattr(n, 'name', None) in public]
        assert part and built and all(f'[`{n.name}`](' in part[1] and (ast.get_docstring(n) or '').split('\n')[0].split('|')[0] in part[1] for n in built), f'{path.stem}: run `python .ci/readme.py`'

def test_every_lesson_has_a_line_and_a_thumbnail_on_the_front_page():
    readme = (site_check.ROOT/'README.md').read_text(encoding='utf-8')
    for path in sorted((site_check.ROOT/'nbs').glob('[0-9][0-9]_*.ipynb')):
        drawn = '"image/png"' in path.read_text(encoding='utf-8')
        assert f'](nbs/{path.name})<br>' in readme and (not drawn or f'](nbs/images/{path.stem}.png)](nbs/{path.name})' in readme), f'{path.stem}: run `python .ci/readme.py`'
        if drawn: assert 1_000 < (path.parent/'images'/f'{path.stem}.png').stat().st_size < 60_000

def test_readme_names_the_commands_that_are_checked():
    readme, ci = ((site_check.ROOT/name).read_text(encoding='utf-8') for name in ('README.md', '.ci/run'))
    for command in ("pip install -e . && cxr-lab run\n", "pip install -e '.[dev]' && pytest\n"): assert f'```bash\n{command}```' in readme
    assert "pip install -e '.[dev]'" in ci

def test_no_page_hides_behind_a_notebook_that_fails(tmp_path):
    root = tmp_path/'checkout'
    (root/'nbs').mkdir(parents=True)
    shutil.copy(site_check.ROOT/'settings.ini', root)
    shutil.copy(site_check.ROOT/'_quarto.yml', root)
    (root/'nbs'/'index.ipynb').write_text('{"cells": [')
    with pytest.raises(RuntimeError, match='nbdev_filter failed on nbs/index.ipynb'): site_check.stage(tmp_path/'staging', root)
