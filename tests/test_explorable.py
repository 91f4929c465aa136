"Pages that carry everything: templates, the map of all images, and that map in a real browser."
import base64, gzip, html, io, json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import cxr_lab
import site_check
from cxr_lab.runs import CLASSES, atomic_path
from cxr_lab.explorable import (
    EXPLORER, embedding_table, environment, explorer, framed, page_data, page_part, sprite, vectors_of)
from cxr_lab.kept import code_of
from cxr_lab.tsne import PALETTES, groups_of
from maps import small, table


# Templates

def test_every_template_is_a_file_of_readable_lines():
    files = sorted(Path(cxr_lab.__file__).parent.glob('templates/*'))
    assert {f.suffix for f in files} == {'.html', '.css', '.js'}
    for file in files:
        assert page_part(file.name) == file.read_text(encoding='utf-8')
        assert max(map(len, page_part(file.name).splitlines())) <= 100, file.name
        if file.suffix == '.html': environment().get_template(file.name)

def test_every_text_is_escaped_and_made_visible():
    page = environment().from_string('{{ a }}|<i title="{{ a }}">|{{ n }}').render(a='=<b>"\n', n=-1)
    assert page == './=&lt;b&gt;&#34;\\n|<i title="./=&lt;b&gt;&#34;\\n">|-1'

def test_a_changed_script_is_a_change_of_the_code_that_draws_the_page(monkeypatch):
    "As it was when the script stood in a module: the step that writes the page runs again."
    before = code_of(explorer)
    monkeypatch.setitem(EXPLORER, 'js', EXPLORER['js'] + '// edited')
    assert [name for name, digest in code_of(explorer).items() if before[name] != digest] == ["EXPLORER['js']"]
    assert not any(str(Path(cxr_lab.__file__).parent) in text for text in before), 'nor where it is installed'


# The table behind a map

def test_the_table_survives_parquet(table, tiny, tmp_path):
    assert list(table.columns[:7]) == ['path', 'label', 'split', 'prediction', 'probability', 'patient', 'subtype'] and vectors_of(table).shape == (len(tiny.index), 96)
    assert (table.prediction == (table.probability >= .5)).all() and (table.path == tiny.index.path).all()
    with atomic_path(tmp_path/'e.parquet') as temporary: table.to_parquet(temporary, index=False)
    back = pd.read_parquet(tmp_path/'e.parquet')
    assert np.array_equal(vectors_of(back), vectors_of(table)) and (back.dtypes[[f'e{i}' for i in range(96)]] == np.float32).all()
    assert (back.probability == table.probability).all() and (back.patient == table.patient).all() and (back.label == table.label).all()

def test_columns_that_look_like_embeddings_are_not_taken_for_them(table):
    assert np.array_equal(vectors_of(table.assign(e=1, extra=2, e1x=3)), vectors_of(table))
    with pytest.raises(ValueError, match='not finite'): embedding_table(table[:1], np.array([[np.inf]]), np.zeros(1))
    with pytest.raises(ValueError, match='2 images, 1 embeddings'): embedding_table(table[:2], np.zeros((1, 3)), np.zeros(2))


# Thumbnails

@pytest.mark.parametrize('n', [1, 2, 5, 9, 10])
def test_the_sheet_has_every_thumbnail_in_its_place(n):
    grays = np.linspace(0, 255, n).round().astype(np.uint8)
    file, columns = sprite(np.broadcast_to(grays[:, None, None, None], (n, 1, 40, 40)), 16, quality=90)
    sheet = np.asarray(Image.open(io.BytesIO(file)).convert('L')).astype(int)
    assert sheet.shape[1] == columns * 16 and sheet.shape[0] % 16 == 0
    for i, gray in enumerate(grays): assert abs(sheet[i // columns * 16 + 8, i % columns * 16 + 8] - gray) < 10

def test_too_many_thumbnails():
    with pytest.raises(ValueError, match='do not fit'): sprite(np.broadcast_to(np.uint8(0), (70_000, 1, 8, 8)), 64)


# The page

@pytest.fixture(scope='module')
def page(table, tiny):
    xy = np.stack([np.arange(len(table)) % 20, np.arange(len(table)) // 20], 1).astype(np.float32) * [3, 1]  # a grid, three times as wide as high per step
    other = table.assign(prediction=1 - table.prediction)
    tables, maps = {'one': table, 'two': other}, {'one': xy, 'two': xy[::-1]}
    return explorer(page_data(tables, maps, {'one': 'first model', 'two': 'second <model>'}, tiny.pixels, tiny.rows('test'), 16, groups_of, PALETTES,
                              'Made-up images & notes.'), 'A <title>')

def test_the_page_knows_everything(page, table, tiny):
    packed = page.split('id="data">')[1].split('</script>')[0]
    facts = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert facts['start'] == 'test' and facts['path'] == table.path.tolist() and facts['sprite']['rows'] == tiny.rows('test').tolist() and facts['sprite']['src'].startswith('data:image/webp')
    one = facts['models'][0]
    xy = np.array(one['xy']).reshape(-1, 2)
    assert one['box'] == xy.max(0).tolist() == [4095, round(4095 * 9 / 57)], 'one scale for both axes'
    assert np.allclose(np.array(one['percent']) / 1000, table.probability, atol=6e-4)
    for by, codes in facts['groups'].items(): assert [list(PALETTES[by])[c] for c in codes] == groups_of(table, by).tolist()
    assert page.count('<script') == 2 and '<title>A &lt;title&gt;</title>' in page

def test_the_same_page_twice(table, tiny):
    args = {'a': table}, {'a': vectors_of(table)[:, :2]}, {'a': 'A'}, tiny.pixels, tiny.rows('test'), 16, groups_of, PALETTES
    assert page_data(*args) == page_data(*args)

def test_other_images_are_refused(table, tiny):
    maps = {'a': vectors_of(table)[:, :2], 'b': vectors_of(table)[:, :2]}
    with pytest.raises(ValueError, match='same images'): page_data({'a': table, 'b': table[::-1].reset_index(drop=True)}, maps, dict(a='', b=''), tiny.pixels, [], 0, groups_of, PALETTES)

def test_a_framed_page_comes_out_as_it_went_in(page):
    inside = framed(page).split('srcdoc="')[1].split('"></iframe>')[0]
    assert '"' not in inside and '<' not in inside and html.unescape(inside) == page

@pytest.fixture(scope='module')
def browser(page, tmp_path_factory):
    if not site_check.chromium(): pytest.skip('no Chromium here')
    folder = tmp_path_factory.mktemp('page')
    (folder/'alone.html').write_text(page, encoding='utf-8')
    (folder/'framed.html').write_text(f'<!doctype html><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><main>{framed(page)}</main>', encoding='utf-8')
    with site_check.Browser(folder) as browser: yield browser

READY = 'new Promise(done => { const wait = () => typeof shown !== "undefined" && shown.length ? done(shown.length) : setTimeout(wait, 30); wait() })'

def show(browser, page='alone.html', width=1280, split='all'):
    "Opens a page and chooses which images are drawn; returns how many."
    assert browser.open(page, width) == []
    assert browser.evaluate(READY) == 40 and browser.evaluate('$("split").value') == 'test', 'it begins with the images that have thumbnails'
    return browser.evaluate(f'(() => {{ $("split").value = "{split}"; $("split").dispatchEvent(new Event("input")); return shown.length }})()')

def point_at(browser, i, kind='mouseMoved'):
    "Moves the mouse onto an image's circle, or clicks there."
    x, y = browser.evaluate(f'(() => {{ const r = canvas.getBoundingClientRect(), [a, b] = place({i}); return [r.left + a / devicePixelRatio, r.top + b / devicePixelRatio] }})()')
    mouse = dict(x=x, y=y, button='none' if kind == 'mouseMoved' else 'left', clickCount=int(kind != 'mouseMoved'))
    browser.call('Input.dispatchMouseEvent', type='mouseMoved', **mouse | dict(button='none', clickCount=0))
    if kind == 'click':
        for part in ('mousePressed', 'mouseReleased'): browser.call('Input.dispatchMouseEvent', type=part, **mouse)
    return browser.evaluate('({text: $("facts").innerText, thumb: !$("thumb").hidden, at: $("thumb").style.backgroundPosition, current})')

@pytest.mark.parametrize('width', [1280, 390])
def test_it_answers_a_hover(browser, table, tiny, width):
    assert show(browser, width=width) == len(table)
    test = tiny.rows('test')
    columns = int(np.ceil(np.sqrt(len(test))))
    for n in (0, 17, 39):
        told = point_at(browser, test[n])
        assert told['current'] == test[n] and told['thumb'] and told['at'] == f'{-(n % columns) * 160}px {-(n // columns) * 160}px'.replace('-0px', '0px')
        assert table.path[test[n]] in told['text'] and CLASSES[table.label[test[n]]] in told['text'] and f'{round(table.probability[test[n]] * 1000) / 1000:.3f}' in told['text']
    train = point_at(browser, 3)
    assert train['current'] == 3 and not train['thumb'] and table.path[3] in train['text'], 'no thumbnail is shown that does not belong to it'
    assert browser.evaluate('document.documentElement.scrollHeight <= innerHeight + 1 && document.documentElement.scrollWidth <= innerWidth')
    assert browser.evaluate('canvas.clientHeight') > 200 and browser.evaluate('new Set(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data).size') > 8

def test_the_thumbnail_is_the_image(browser, tiny):
    show(browser, split='test')
    row = tiny.rows('test')[17]
    point_at(browser, row)
    box = browser.evaluate('(() => { const r = $("thumb").getBoundingClientRect(); return {x: r.x, y: r.y, width: r.width, height: r.height, scale: 1} })()')
    shot = np.asarray(Image.open(io.BytesIO(base64.b64decode(browser.call('Page.captureScreenshot', format='png', clip=box)['data']))).convert('L').resize((8, 8), Image.Resampling.BOX), float)
    others = {i: np.asarray(Image.fromarray(tiny.pixels[i, 0]).resize((8, 8), Image.Resampling.BOX), float) for i in tiny.rows('test')}
    assert min(others, key=lambda i: np.abs(others[i] - shot).mean()) == row

def test_models_errors_splits_and_keeping(browser, table):
    show(browser)
    def choose(script): return browser.evaluate(f'(() => {{ {script}; return shown.length }})()')
    def select(name, value): return choose(f'$("{name}").value = "{value}"; $("{name}").dispatchEvent(new Event("input"))')
    wrong = int((table.label != table.prediction).sum())
    tick = '$("errors").click()'
    assert browser.evaluate('$("model").selectedOptions[0].text') == 'second <model>' and choose(tick) == len(table) - wrong
    assert select('model', '0') == wrong and choose(tick) == len(table)
    assert select('split', 'test') == 40 and select('split', 'all') == len(table)
    for by in PALETTES:
        select('by', by)
        legend = browser.evaluate('[...$("legend").children].map(e => e.textContent)')
        assert sorted(legend) == sorted(f'{g} ({n})' for g, n in groups_of(table, by).value_counts().items())
    kept = point_at(browser, 170, 'click')
    assert kept['current'] == 170 and point_at(browser, 20)['current'] == 170, 'a click keeps it'
    before = browser.evaluate('place(170)')
    select('model', '1')
    assert browser.evaluate('current') == 170 and browser.evaluate('place(170)') != before
    browser.evaluate('canvas.focus()')
    for _ in range(2): browser.call('Input.dispatchKeyEvent', type='keyDown', key='ArrowRight', code='ArrowRight', windowsVirtualKeyCode=39)
    assert browser.evaluate('current') == 172

def test_it_works_inside_another_page(browser, table):
    for width in (1280, 390):
        assert browser.open('framed.html', width) == []
        inside = 'document.querySelector("iframe").contentWindow'
        count = browser.evaluate(f'new Promise(done => {{ const wait = () => {inside}.eval("typeof shown !== \'undefined\' && shown.length") ? done({inside}.eval("shown.length")) : setTimeout(wait, 30); wait() }})')
        assert count == 40 and browser.evaluate(f'{inside}.document.documentElement.scrollWidth') <= width
