"The report page: what stands in it, what cannot get into it, and how it behaves in a browser."
import base64, csv, io, os, re, shutil, time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import site_check
from PIL import Image

from cxr_lab.answers import COLUMNS, to_cell
from cxr_lab.explorable import page_part, shown
from cxr_lab.gradcam import overlay
from cxr_lab.pages import NOTICE, SIDE, data_uri, read_heatmap, read_plain, read_rows, write_report
from cxr_lab.phantom import make_phantom
from cxr_lab.runs import CLASSES, write_json

HOSTILE = ['<script>alert(1)</script>.png', '"><img src=x onerror=alert(2)>.png', "' onmouseover='alert(3)", 'two\r\nlines.png', os.fsdecode(b'caf\xe9\xff.png'), '\u202egpj.exe', '{{ 7*7 }}', '{% raw %}',
           '=HYPERLINK("http://x.example")', '@SUM(1)', '</style></script><b>', '&lt;b&gt;', '\x00\x1b[31m', 'javascript:alert(4)', '-->', ']]>', '\ud800', 'a' * 300]

def write_table(out, rows):
    "predictions.csv as `predict_files` writes it."
    out.mkdir(parents=True, exist_ok=True)
    with open(out/'predictions.csv', 'w', encoding='utf-8', newline='') as f:
        table = csv.writer(f, quoting=csv.QUOTE_ALL, lineterminator='\n')
        table.writerow(COLUMNS)
        table.writerows([to_cell(str(r.get(c, ''))) for c in COLUMNS] for r in rows)

def answer(path, p, **more):
    label = CLASSES[p >= .5]
    return dict(path=path, label=label, probability=p, threshold=.5, explained=label) | more

@pytest.fixture(scope='module')
def example(tmp_path_factory):
    "250 answers, the first 12 with pictures; unusual: 3 and 8, not read: 20."
    out = tmp_path_factory.mktemp('report')/'out'
    films, rows, rng = out.parent/'films', [], np.random.default_rng(0)
    (out/'heatmaps').mkdir(parents=True); films.mkdir()
    for i in range(250):
        row = answer((films/f'film {i}.png').as_posix(), round(rng.random(), 6))
        if i < 12:
            image = make_phantom(i, i % 2, size=160).image
            Image.fromarray(image).save(films/f'film {i}.png')
            Image.fromarray(overlay(image, np.linspace(0, 1, 160, dtype=np.float32) * np.ones((160, 1), np.float32))).save(out/'heatmaps'/f'{i}.png')
            row['heatmap'] = f'heatmaps/{i}.png'
        if i in (3, 8): row['warning'] = 'a side view?; too dark'
        if i == 20: row = dict(path=row['path'], error='the file is empty')
        rows.append(row)
    write_table(out, rows)
    write_json(out/'provenance.json', dict(caveat='said once', complete=True, created='2026-01-31T10:00:00+00:00', model=dict(file='m.safetensors', sha256='ab' * 32, test=dict(auroc=.9512345, recall=None)), counts=dict(files=250)))
    write_report(out)
    return out

class Tags(HTMLParser):
    "The elements of a page with the names of their attributes, and the text of each."
    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes): self.tags.append((tag, tuple(k for k, _ in attributes)))
    def handle_data(self, data): self.text.append(data)


# What stands in it

def test_attention_first_and_no_row_lost(example):
    rows = read_rows(example/'predictions.csv')
    assert [r['path'].split()[-1] for r in rows[:5]] == ['20.png', '3.png', '8.png', '0.png', '1.png'] and len(rows) == 250
    assert rows[0]['probability'] is None and isinstance(rows[1]['probability'], float)
    page = (example/'report.html').read_text(encoding='utf-8')
    assert page.count('<tr data-kind') == 250 and page.count('class="thumb"') == 12 and page.count('src="data:image/webp') == 24
    assert '249 probabilities' in page and 'All 250' in page and 'unusual 2' in page and 'not read 1' in page and '2026-01-31' in page

def test_provenance_and_caveat_are_said_once(example):
    text = ' '.join(Tags((example/'report.html').read_text(encoding='utf-8')).text)
    assert text.count(NOTICE) == 1 and 'said once' not in text
    for said in ('ab' * 32, '0.9512', 'm.safetensors', 'unknown'): assert text.count(said) == 1

def test_thumbnails_show_the_pictures(example):
    page = (example/'report.html').read_text(encoding='utf-8')
    row = next(r for r in page.split('<tr ') if 'film 5.png' in r)
    plain, heat = (np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))), float) for uri in re.findall('src="data:image/webp;base64,(.+?)"', row))
    film, over = (Image.open(p).resize((SIDE, SIDE), Image.Resampling.BOX) for p in (example.parent/'films'/'film 5.png', example/'heatmaps'/'5.png'))
    assert plain.shape == heat.shape == (SIDE, SIDE, 3), 'WebP knows color only'
    assert np.abs(plain.mean(2) - np.asarray(film, float)).mean() < 6 and np.abs(heat - np.asarray(over, float)).mean() < 9 and np.ptp(plain, 2).max() < 8
    assert 'raised the score of ' + next(r['explained'] for r in read_rows(example/'predictions.csv') if r['path'].endswith('film 5.png')) in row

def test_pictures_that_are_not_there(example, tmp_path):
    out = shutil.copytree(example, tmp_path/'out')
    (out/'heatmaps'/'0.png').unlink()
    (out/'heatmaps'/'1.png').write_bytes(b'damaged')
    assert write_report(out).read_text().count('class="thumb"') == 10
    page = write_report(out, thumbnails=4).read_text()
    assert page.count('class="thumb"') == 2 and 'first 4 rows' in page, 'rows 20 and 0 have none'
    assert read_plain(tmp_path/'gone.png') is None and read_heatmap(out, '') is None
    Image.new('RGB', (4, 4)).save(tmp_path/'secret.png')
    (out/'link.png').symlink_to(tmp_path/'secret.png')
    for name in ('../secret.png', str(tmp_path/'secret.png'), 'link.png', 'heatmaps', 'heatmaps/\udcff.png'): assert read_heatmap(out, name) is None, name

def test_without_the_originals_the_heatmap_stays(example, tmp_path):
    out = shutil.copytree(example, tmp_path/'out')
    text = (out/'predictions.csv').read_text(encoding='utf-8').replace('films/', 'moved/')
    (out/'predictions.csv').write_text(text, encoding='utf-8')
    page = write_report(out).read_text(encoding='utf-8')
    assert page.count('src="data:image/webp') == 12 and '<button type="button" class="thumb"' not in page

@pytest.mark.parametrize('rows, there, absent', [
    ([dict(path='a', error='bad')], ['not read 1', 'unknown'], ['<svg', 'threshold']),
    ([answer('a', .7), answer('b', .7, threshold=.8, label='NORMAL')], ['2 probabilities.', '<svg'], ['threshold 0', 'at or above']),
    ([answer('a', 1.), answer('b', 0.)], ['at or above the threshold of 0.5', 'y="0.0000" height="1.0000"'], []),
    ([], ['All 0'], ['<svg'])])
def test_few_rows(tmp_path, rows, there, absent):
    write_table(tmp_path, rows)
    write_json(tmp_path/'provenance.json', dict(complete=False, x=None))
    page = write_report(tmp_path).read_text().split('</style>', 1)[1].split('<script>')[0]
    assert all(t in page for t in there) and not any(t in page for t in absent) and 'This is a part' in page

def test_a_report_that_fails_leaves_the_older_one(example, tmp_path, monkeypatch):
    out = shutil.copytree(example, tmp_path/'out')
    before = (out/'report.html').read_bytes()
    monkeypatch.setattr('cxr_lab.pages.data_uri', lambda *a, **k: 1/0)
    with pytest.raises(ZeroDivisionError): write_report(out)
    assert (out/'report.html').read_bytes() == before and sorted(p.name for p in out.iterdir()) == ['heatmaps', 'predictions.csv', 'provenance.json', 'report.html']


# What cannot get into it

def test_names_from_strangers_are_text(tmp_path):
    def tags(folder, names):
        write_table(tmp_path/folder, [answer(n, .5, warning=n, notes=n) for n in names] + [dict(path='x', error=n) for n in names])
        write_json(tmp_path/folder/'provenance.json', {f'{i}{n}': [n, 1] for i, n in enumerate(shown(n) for n in names)})
        return Tags(write_report(tmp_path/folder).read_text(encoding='utf-8'))
    hostile = [n.replace('/', '\u2215') for n in HOSTILE]  # one folder level in both
    bad, good = tags('bad', hostile), tags('good', [f'name {i}' for i in range(len(hostile))])
    assert bad.tags == good.tags, 'the same elements and attributes'
    texts = [t.strip() for t in bad.text]
    for name in hostile: assert texts.count(shown(name)) >= 3 and shown(name).isprintable(), name

def test_nothing_that_a_spreadsheet_computes(tmp_path):
    starts = '=+-@\t\r＝＋－＠'
    write_table(tmp_path, [answer(f'{c}1+1', .5, warning=f'{c}2', notes=f'{c}3') for c in starts])
    write_json(tmp_path/'provenance.json', {})
    cells = [t.strip() for t in Tags(write_report(tmp_path).read_text(encoding='utf-8').split('<tbody>')[1]).text]
    assert not [c for c in cells if c.startswith(tuple(starts))]

def test_shown_keeps_what_can_be_read():
    assert shown('Röntgen – 胸部 (2).png') == 'Röntgen – 胸部 (2).png' and shown('') == '' and shown('x=1') == 'x=1' and shown('=x') == './=x'

def test_policy_lists_what_the_page_holds(example):
    import hashlib
    page = (example/'report.html').read_text(encoding='utf-8')
    policy = re.search('Content-Security-Policy" content="(.+?)"', page)[1].replace('&#39;', "'")
    for kind in ('style', 'script'):
        found = re.findall(f'<{kind}>(.*?)</{kind}>', page, re.S)
        assert found and [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in found] == re.findall("'sha256-(.+?)'", re.search(f'{kind}-src (.+?);', policy)[1])
    assert policy.startswith("default-src 'none'") and 'unsafe' not in policy and 'http' not in policy
    assert not re.search(r'\s(on\w+|style)=|(src|href)="(?!data:)', re.sub('<(style|script)>.*?</', '', page, flags=re.S))

def luminance(color):  # WCAG 2.2
    c = np.array([int(color[i:i + 2], 16) for i in (1, 3, 5)] if len(color) == 7 else [int(x, 16) * 17 for x in color[1:]]) / 255
    return np.where(c <= .04045, c / 12.92, ((c + .055) / 1.055)**2.4) @ [.2126, .7152, .0722]

def test_text_can_be_read_in_both_themes():
    light, dark = (dict(re.findall(r'--([\w-]+): (#\w+)', part)) for part in page_part('theme.css').split('@media (prefers-color-scheme: dark)'))
    for colors in (light, light | dark):
        for text, ground in [('ink', 'ground'), ('ink', 'card'), ('soft', 'ground'), ('soft', 'card'), ('ground', 'accent'), ('attention', 'ground'), ('ink', 'attention-ground')]:
            a, b = sorted([luminance(colors[text]), luminance(colors[ground])])
            assert (b + .05) / (a + .05) >= 4.5, f'{text} on {ground}'


# In a browser

@pytest.fixture(scope='module')
def browser(example):
    if not site_check.chromium(): pytest.skip('no Chromium here')
    with site_check.Browser(example) as browser: yield browser

NAMES = "[...document.querySelectorAll('tbody .name')].map(e => e.textContent)"

def show(browser, width=1280, dark=False):
    assert browser.open('report.html', width, dark=dark) == []

def wait(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline: time.sleep(.05)
    return found

def click(browser, selector): browser.evaluate(f'document.querySelector({selector!r}).click()')

@pytest.mark.parametrize('width', [1280, 390])
@pytest.mark.parametrize('dark', [False, True])
def test_it_fits_and_asks_for_nothing(browser, width, dark):
    show(browser, width, dark)
    asked = [e['params']['request']['url'] for e in browser.events if e.get('method') == 'Network.requestWillBeSent']
    assert [u for u in asked if not u.startswith('data:')] == [f'http://127.0.0.1:{browser.server.server_port}/report.html']
    assert browser.evaluate('document.documentElement.scrollWidth') <= width
    ground = browser.evaluate('getComputedStyle(document.body).backgroundColor')
    assert (max(map(int, re.findall(r'\d+', ground))) < 64) == dark

def test_sorting(browser, example):
    show(browser)
    rows = {Path(r['path']).name: r['probability'] for r in read_rows(example/'predictions.csv')}
    start = browser.evaluate(NAMES)
    assert start == list(rows)[:100], 'attention first, a hundred at a time'
    click(browser, '[data-by=number]')
    assert browser.evaluate(NAMES) == sorted(rows, key=lambda n: -(rows[n] if rows[n] is not None else -1))[:100]
    click(browser, '[data-by=number]')
    assert browser.evaluate(NAMES) == sorted(rows, key=lambda n: rows[n] if rows[n] is not None else 2)[:100]
    assert browser.evaluate("[...document.querySelectorAll('[aria-sort]')].map(e => e.ariaSort)") == ['none', 'ascending']
    click(browser, '[data-by=name]')
    assert browser.evaluate(NAMES) == [f'film {i}.png' for i in range(100)], '2 before 10'
    assert browser.evaluate("[...document.querySelectorAll('[aria-sort]')].map(e => e.ariaSort)") == ['ascending', 'none']
    for _ in range(2): click(browser, '[data-by=name]')
    assert browser.evaluate(NAMES) == start
    for _ in range(2): click(browser, '#next')
    assert len(browser.evaluate(NAMES)) == 50 and browser.evaluate("document.querySelector('#next').disabled") and browser.evaluate("document.querySelector('output').textContent") == '201 to 250 of 250'
    click(browser, '#back')
    assert browser.evaluate(NAMES) == list(rows)[100:200]

def test_filtering(browser, example):
    show(browser)
    positive = sum(r['label'] == 'PNEUMONIA' for r in read_rows(example/'predictions.csv'))
    def count(): return browser.evaluate("document.querySelector('output').textContent")
    for kind, n in (('PNEUMONIA', positive), ('NORMAL', 249 - positive), ('unusual', 2), ('not read', 1)):
        click(browser, f'[name=kind][value="{kind}"]')
        assert count().endswith(f' of {n}'), kind
    click(browser, '[value=All]')
    def search(text): browser.evaluate(f"(() => {{ const i = document.querySelector('[type=search]'); i.value = {text!r}; i.dispatchEvent(new Event('input')) }})()")
    search('FILM 24')
    assert browser.evaluate(NAMES) == ['film 24.png', *[f'film 24{i}.png' for i in range(10)]]
    search('nowhere')
    assert count() == 'No such row'

def test_heatmaps_come_and_go(browser):
    show(browser)
    seen = "[...document.querySelectorAll('.thumb')].map(b => [...b.children].filter(i => i.checkVisibility()).map(i => i.className).join())"
    assert browser.evaluate(seen) == ['heat'] * 12
    click(browser, '.thumb')
    assert browser.evaluate(seen) == ['plain'] + ['heat'] * 11
    click(browser, '#heat')
    assert browser.evaluate(seen) == ['plain'] * 12 and browser.evaluate("document.querySelector('#heat').ariaPressed") == 'false'
    click(browser, '#heat')
    assert browser.evaluate(seen) == ['heat'] * 12
    assert browser.evaluate("[...document.images].every(i => i.alt) && [...document.querySelectorAll('button')].every(b => b.ariaLabel || b.textContent)")

def test_what_gets_in_cannot_act(browser):
    show(browser)
    browser.events.clear()
    browser.evaluate('''document.body.insertAdjacentHTML('beforeend', '<img src="/x.png" onerror="window.hacked = 1"><svg onload="window.hacked = 1"></svg><form action="/f"><button id="send"></button></form>');
        { const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s); } document.querySelector('#send').click(); new Promise(done => setTimeout(done, 300))''')
    assert browser.evaluate('window.hacked === undefined')
    refused = [e for e in browser.events if e.get('method') == 'Log.entryAdded' and 'Content Security Policy' in e['params']['entry']['text']]
    assert len(refused) >= 3 and not [e for e in browser.events if e.get('method') == 'Network.responseReceived'], 'not even a request'

def test_as_a_file(browser, example):
    browser.call('Page.navigate', url=(example/'report.html').as_uri())
    assert wait(lambda: browser.evaluate("location.protocol === 'file:' && document.readyState === 'complete'")) and len(browser.evaluate(NAMES)) == 100

def test_without_scripts(browser, example):
    browser.call('Emulation.setScriptExecutionDisabled', value=True)
    try:
        browser.events.clear()
        browser.call('Page.navigate', url=f'http://127.0.0.1:{browser.server.server_port}/report.html')
        def node(selector): return browser.call('DOM.querySelector', nodeId=browser.call('DOM.getDocument')['root']['nodeId'], selector=selector)['nodeId']
        assert wait(lambda: browser.call('DOM.getDocument') and any(e.get('method') == 'Page.loadEventFired' for e in browser.events))
        assert node('tr:nth-child(250)') and not node('tr:nth-child(251)')
        assert browser.call('DOM.getBoxModel', nodeId=node('tr:nth-child(250)'))['model']['height'] > 20
        with pytest.raises(RuntimeError): browser.call('DOM.getBoxModel', nodeId=node('.pager'))  # it would do nothing
    finally: browser.call('Emulation.setScriptExecutionDisabled', value=False)
