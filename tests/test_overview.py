"The page of a run: what it leads to, what it says of lessons that are not complete, and that it needs no network."
import base64, os
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import site_check
from cxr_lab.overview import heading, render_lesson, write_overview
from cxr_lab.pipeline import NotebookFailed, run_pipeline
from cxr_lab.runs import write_json

LOADS = {'img': 'src', 'script': 'src', 'link': 'href', 'iframe': 'src', 'source': 'src', 'object': 'data'}
PIXEL = ('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII=')

class Page(HTMLParser):
    "What a page links, what it loads, the alternative texts of its pictures, and its text."
    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.alts, self.text, self.scripts = [], [], [], '', 0
        self.feed(Path(path).read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == 'a' and attrs.get('href', '#')[0] != '#': self.links.append(unquote(attrs['href']))
        if tag in LOADS and LOADS[tag] in attrs: self.loads.append(attrs[LOADS[tag]])
        if tag == 'img': self.alts.append(attrs.get('alt'))
        self.scripts += tag == 'script'

    def handle_data(self, data): self.text += data

RUN_DIR = "run_dir: str = 'runs/default'  # run folder"
SAVES = f"""from pathlib import Path
import base64
size = Path(run_dir, '00_data', 'a figure.png').write_bytes(base64.b64decode('{PIXEL}'))"""

def write_lesson(stem, title, *codes):
    "The first cell holds the parameters."
    cells = [new_code_cell(c, metadata={} if i else {'tags': ['parameters']}) for i, c in enumerate([RUN_DIR, *codes])]
    Path('nbs').mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell(title), *cells]), f'nbs/{stem}.ipynb')

@pytest.fixture
def nbs(tmp_path, monkeypatch):
    "Two lessons; the second one fails unless there is a file `mended`."
    monkeypatch.chdir(tmp_path)
    write_lesson('00_data', '# 00 · <b>Data</b> & more\n> Why `<i>`?', SAVES, "#| fig-alt: 'x'\nprint('<script>1</script>')")
    write_lesson('01_train', '# 01 · Training', "from pathlib import Path\nif not Path('mended').exists(): raise ValueError('no')")

def run(**kwargs): return run_pipeline(nbs='nbs', run_dir='runs/ü r', **kwargs)

def test_a_failed_run_leads_to_what_is_complete_and_a_resumed_one_to_all(nbs):
    "One story, because every kernel costs seconds."
    with pytest.raises(NotebookFailed): run()
    page = Page('runs/ü r/index.html')
    assert '1 of 2 lessons are complete' in page.text and 'not complete' in page.text
    assert 'None yet: the run has not come to its end.' in page.text
    assert {'00_data/00_data.html', '00_data/00_data.ipynb', '00_data/a figure.png', '01_train/01_train.partial.ipynb'} == set(page.links)
    assert '00 · <b>Data</b> & more' in page.text and 'Why `<i>`?' in page.text, 'titles are text'
    Path('mended').touch()
    done = run(resume=True)
    page = Page(done/'index.html')
    assert '2 of 2 lessons are complete' in page.text and 'no classifier has been trained' in page.text
    assert {'00_data/00_data.html', '01_train/01_train.html', 'results.json'} <= set(page.links)
    for name in ('index.html', '00_data/00_data.html', '01_train/01_train.html'):
        page = Page(done/name)
        assert page.scripts == 0 and not [load for load in page.loads if '//' in load], name
        missing = [link for link in page.links if not ((done/name).parent/link).exists()]
        assert missing == [], name
    lesson = Page(done/'00_data/00_data.html')
    assert '<script>1</script>' in lesson.text and 'fig-alt' not in lesson.text
    run(notebooks='00')
    assert 'outdated: 00_data ran again since' in Page(done/'index.html').text

def test_an_interrupted_run_has_its_page(nbs, monkeypatch):
    def interrupted(*args, **kwargs): raise KeyboardInterrupt('00_data was interrupted')
    monkeypatch.setattr('cxr_lab.pipeline._execute', interrupted)
    with pytest.raises(KeyboardInterrupt, match='00_data was interrupted'): run()
    assert '0 of 2 lessons are complete' in Page('runs/ü r/index.html').text

def executed(run, stem, *cells):
    path = run/stem/f'{stem}.ipynb'
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), path)
    write_json(run/stem/'status.json', {'notebook': stem, 'id': stem, 'upstream': {}, 'seconds': 3.})
    return path

def test_what_a_lesson_shows(tmp_path):
    picture = new_output('display_data', {'image/png': PIXEL})
    path = executed(tmp_path, '04_augment',
                    new_markdown_cell('# Title\n\n> Sub\n\n[before](03_train.ipynb#fit), [its page](lab/cores.ipynb), '
                                      '[far](https://example.org/a.ipynb)'),
                    new_code_cell('#| export\n#| fig-alt: "One & <two>"\na = 1 < 2', outputs=[picture]),
                    new_code_cell('#| hide\n'))
    page = Page(render_lesson(path))
    assert page.alts == ['One & <two>'] and 'a = 1 < 2' in page.text
    assert 'export' not in page.text and '#|' not in page.text
    assert page.links == ['../index.html', '04_augment.ipynb', '../03_train/03_train.html#fit', 'https://example.org/a.ipynb']
    assert 'its page' in page.text, 'a page that no run makes is no link'

def test_a_page_is_made_once_for_each_execution(tmp_path, monkeypatch):
    path = executed(tmp_path, '00_data', new_markdown_cell('# One'))
    page = render_lesson(path)
    page.write_text('kept')
    render_lesson(path)
    assert page.read_text() == 'kept'
    executed(tmp_path, '00_data', new_markdown_cell('# Two'))
    os.utime(page, (1e9, 1e9))
    assert 'Two' in Page(render_lesson(path)).text

def test_a_page_that_fails_leaves_the_older_one(tmp_path, monkeypatch):
    executed(tmp_path, '00_data', new_markdown_cell('# One'))
    lessons = [Path('00_data.ipynb')]
    before = write_overview(tmp_path, lessons).read_text()
    def cut(self, text, **kwargs):
        self.write_bytes(text[:100].encode())
        raise OSError('No space left on device')
    monkeypatch.setattr(Path, 'write_text', cut)
    with pytest.raises(OSError): write_overview(tmp_path, lessons)
    monkeypatch.undo()
    assert (tmp_path/'index.html').read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['00_data', 'index.html']

def test_results_are_means_over_seeds(tmp_path):
    metrics = dict.fromkeys(('precision', 'accuracy', 'f1', 'specificity', 'balanced_accuracy', 'auroc'), .5)
    rows = [dict(experiment='a < b', seed=seed, threshold_rule='0.5', threshold=.5, n=8, recall=recall) | metrics
            for seed, recall in enumerate((.25, .5))]
    results = {'rows': rows, 'provenance': {'data': 'phantom', 'dataset': None}}
    text = Page(write_overview(tmp_path, [], results)).text
    assert 'a < b' in text and '0.375 ± 0.177' in text and '---' not in text
    assert 'Computed on generated phantoms, not on patients.' in text

def test_titles():
    assert heading(new_notebook(cells=[new_code_cell('# no'), new_markdown_cell('# A\n> b')])) == ('A', 'b')
    assert heading(new_notebook(cells=[new_markdown_cell('text')])) == heading(new_notebook()) == ('', '')

def test_in_a_browser(tmp_path):
    if not site_check.chromium(): pytest.skip('no Chromium here')
    executed(tmp_path, '00_data', new_markdown_cell('# One'), new_code_cell('x = ' + '1 + ' * 99 + '1'))
    (tmp_path/'00_data/a.png').write_bytes(base64.b64decode(PIXEL))
    write_overview(tmp_path, [Path('00_data.ipynb')])
    with site_check.Browser(tmp_path) as browser:
        for page in ('index.html', '00_data/00_data.html'):
            for width in (390, 1280): assert browser.open(page, width, dark=width == 390) == []
