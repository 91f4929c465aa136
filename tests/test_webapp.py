"The local page: what it answers, whom it answers, and what it leaves behind, which is nothing."
import base64, io, logging, os, re, signal, socket, subprocess, sys, threading, time
from pathlib import Path

import cv2
import numpy as np
import pytest
import requests
import site_check
from PIL import Image

from cxr_lab.films import read_film
from cxr_lab.phantom import make_phantom
from cxr_lab.predict import Explained
from cxr_lab.runs import CLASSES
from cxr_lab.webapp import create_app, outline_path, running

LIMIT = 300_000

def png(image, form='PNG'):
    file = io.BytesIO()
    Image.fromarray(image).save(file, form)
    return file.getvalue()

def egg(shape):
    y, x = np.indices(shape) / np.array(shape)[:, None, None]
    return ((x - .5) / .3)**2 + ((y - .4) / .2)**2 < 1

class StandIn:
    "Says what `cxr_lab.predict.Predictor` would: PNEUMONIA with the mean brightness as its probability, an egg in the middle for lungs."
    file = Path('stand-in.safetensors')
    def __init__(self): self.now = self.most = self.asked = 0; self.delay = 0

    def explain(self, content, outline=False):
        self.asked += 1; self.now += 1; self.most = max(self.most, self.now)
        time.sleep(self.delay); self.now -= 1
        film = read_film(content)
        if film.pixels.shape == (7, 7): raise RuntimeError('the patient is Jane Roe')
        p, heat = float(film.pixels.mean() / 255), film.pixels / np.float32(255)
        label = CLASSES[p >= .25]
        return Explained('image', p, label, .25, 'too square; too dark' if outline else 'too square', '', '; '.join(film.notes), label, film.pixels, heat, heat, egg(film.pixels.shape) if outline else None)

@pytest.fixture(scope='module')
def stand_in(): return StandIn()

@pytest.fixture(scope='module')
def url(stand_in):
    with running(create_app(stand_in, max_bytes=LIMIT)) as url: yield url

@pytest.fixture(scope='module')
def session():
    with requests.Session() as session:
        session.trust_env = False  # no proxy between this computer and itself
        yield session

@pytest.fixture(scope='module')
def token(session, url): return {'X-CXR-Lab': re.search('data-token="(.+?)"', session.get(url).text)[1]}

@pytest.fixture(scope='module')
def xray(): return make_phantom(5, 1, size=192).image


# What it answers

def test_an_answer(session, url, token, xray):
    reply = session.post(url + 'explain', png(xray), headers=token)
    a = reply.json()
    expected = StandIn().explain(png(xray))
    assert reply.status_code == 200 and a['probability'] == expected.probability and (a['label'], a['explained'], a['warning'], a['threshold'], a['zero']) == (expected.label, expected.label, 'too square', .25, False)
    gray, heat = (np.asarray(Image.open(io.BytesIO(base64.b64decode(a[k].removeprefix('data:image/webp;base64,')))), int) for k in ('gray', 'heat'))
    assert (a['height'], a['width']) == gray.shape[:2] == xray.shape and np.abs(gray[..., 0] - xray).mean() < 3
    assert heat.shape == (*xray.shape, 4) and np.abs(heat[..., 3] - xray).mean() < 3, 'as opaque as it is hot'
    assert session.post(url + 'explain', png(xray, 'JPEG'), headers=token).json()['label'] == a['label']

def test_the_outline_is_the_border_of_the_lungs(session, url, token, xray):
    a = session.post(url + 'outline', png(xray), headers=token).json()
    filled, contours = np.zeros(xray.shape, np.uint8), [np.array([p.split() for p in part.rstrip('Z').split('L')], int)[:, None] for part in a['path'].split('M')[1:]]
    cv2.drawContours(filled, contours, -1, 255, cv2.FILLED)
    assert a['warning'] == 'too square; too dark' and len(contours) == 1 and ((filled > 0) != egg(xray.shape)).mean() < .005
    assert outline_path(np.zeros((5, 5), bool)) == ''

@pytest.mark.parametrize('content, status, said', [(b'', 422, 'empty'), (b'Dear colleague,', 422, 'not read'), (png(np.zeros((64, 64), np.uint8))[:60], 422, 'not read'), (bytes(LIMIT + 1), 413, 'limit is 0.286 MB')])
def test_errors_are_one_sentence(session, url, token, content, status, said):
    reply = session.post(url + 'explain', content, headers=token)
    assert reply.status_code == status and said in reply.json()['error'] and '\n' not in reply.json()['error'] and '/' not in reply.json()['error']

def test_a_decompression_bomb_is_refused(session, url, token):
    bomb = io.BytesIO()
    Image.new('1', (20_000, 20_000)).save(bomb, 'PNG')
    reply = session.post(url + 'explain', bomb.getvalue(), headers=token)
    assert reply.status_code == 422 and '100,000,000 pixels' in reply.json()['error']

def test_reading_stops_at_the_limit(url, token):
    host, port = url[7:-1].split(':')
    head = f'POST /explain HTTP/1.1\r\nHost: {host}:{port}\r\nX-CXR-Lab: {token["X-CXR-Lab"]}\r\n'
    with socket.create_connection((host, int(port)), timeout=20) as s:  # a declared length is believed, and nothing read
        s.sendall((head + 'Content-Length: 99999999999\r\n\r\n').encode())
        assert b' 413 ' in s.recv(4096)
    with socket.create_connection((host, int(port)), timeout=20) as s:  # an undeclared one is counted
        s.sendall((head + 'Transfer-Encoding: chunked\r\n\r\n').encode())
        for _ in range(LIMIT // 0x10000 + 2): s.sendall(b'10000\r\n' + bytes(0x10000) + b'\r\n')
        assert b' 413 ' in s.recv(4096), 'the end was not waited for'

def test_one_at_a_time_while_the_page_answers(session, url, token, stand_in, xray):
    stand_in.delay, stand_in.most = .4, 0
    try:
        threads = [threading.Thread(target=requests.post, args=(url + 'explain', png(xray)), kwargs=dict(headers=token, proxies={'http': ''})) for _ in range(3)]
        for t in threads: t.start()
        start = time.monotonic()
        assert session.get(url).status_code == 200 and time.monotonic() - start < .4
        for t in threads: t.join()
    finally: stand_in.delay = 0
    assert stand_in.most == 1


# Whom it answers

@pytest.mark.parametrize('headers, status', [
    ({}, 200), ({'Origin': 'own'}, 200), ({'Sec-Fetch-Site': 'same-origin'}, 200),
    ({'X-CXR-Lab': ''}, 403), ({'X-CXR-Lab': 'guessed'}, 403), ({'X-CXR-Lab': b'\xff'}, 403), ({'Origin': 'http://evil.example'}, 403), ({'Origin': 'null'}, 403), ({'Origin': 'http://localhost:1'}, 403),
    ({'Sec-Fetch-Site': 'cross-site'}, 403), ({'Sec-Fetch-Site': 'same-site'}, 403),
    ({'Host': 'evil.example'}, 400), ({'Host': '127.0.0.1.evil.example'}, 400), ({'Host': 'localhost'}, 200)])
def test_only_our_own_page_gets_an_answer(session, url, token, stand_in, xray, headers, status):
    before = stand_in.asked
    reply = session.post(url + 'explain', png(xray), headers=token | {k: url[:-1] if v == 'own' else v for k, v in headers.items()})
    assert reply.status_code == status and (stand_in.asked > before) == (status == 200)
    assert 'Access-Control-Allow-Origin' not in reply.headers

def test_every_answer_forbids_storing_and_framing(session, url, token):
    replies = [session.get(url), session.get(url + 'nothing'), session.get(url + 'explain'), session.post(url + 'explain', b'x', headers=token), session.get(url, headers={'Host': 'evil.example'}), session.options(url + 'explain')]
    assert [r.status_code for r in replies] == [200, 404, 405, 422, 400, 405]
    for r in replies:
        h = r.headers
        assert h['Cache-Control'] == 'no-store' and h['X-Content-Type-Options'] == 'nosniff' and h['X-Frame-Options'] == 'DENY' and h['Cross-Origin-Resource-Policy'] == 'same-origin' and 'set-cookie' not in h
        assert all(part in h['Content-Security-Policy'] for part in ("default-src 'none'", "frame-ancestors 'none'", "connect-src 'self'")) and 'unsafe' not in h['Content-Security-Policy'] and 'uvicorn' not in str(h)

def test_a_new_token_each_time():
    pages = [next(r.endpoint for r in create_app(StandIn()).routes if r.path == '/') for _ in range(2)]
    import asyncio
    tokens = [re.search(b'data-token="(.+?)"', asyncio.run(p(None)).body)[1] for p in pages]
    assert tokens[0] != tokens[1] and min(map(len, tokens)) >= 40

def test_other_computers_cannot_reach_it(url):
    port = int(url.split(':')[2].strip('/'))
    own = next((a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET) if not a[4][0].startswith('127.')), None)
    if own is None: pytest.skip('this computer has no address but 127.0.0.1')
    with pytest.raises(OSError): socket.create_connection((own, port), timeout=2)


# What it leaves behind

def test_nothing_is_written(session, url, token, xray, tmp_path, monkeypatch):
    dicom = dicom_file(tmp_path, xray)
    session.post(url + 'explain', dicom, headers=token)  # imports are done
    written, watching = [], True
    def watch(event, args):
        if not watching: return
        if event == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): written.append(args[0])
        if event in ('os.mkdir', 'os.rename', 'os.link', 'os.symlink', 'os.truncate', 'tempfile.mkstemp', 'tempfile.mkdtemp', 'sqlite3.connect', 'subprocess.Popen'): written.append((event, args))
    sys.addaudithook(watch)  # it sees what Python opens, from all threads
    try:
        (tmp_path/'seen').write_text('x')
        assert written and str(written.pop()).endswith('seen'), 'the watch works'
        for content in (dicom, png(xray), png(xray, 'TIFF'), b'no picture', bytes(LIMIT - 1), bytes(LIMIT + 1)): session.post(url + 'explain', content, headers=token)
        session.post(url + 'outline', png(xray), headers=token)
    finally: watching = False
    assert not written

def dicom_file(folder, image):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, '1.2.840.10008.5.1.4.1.1.1.1', generate_uid()
    ds = FileDataset('x.dcm', {}, file_meta=meta, preamble=bytes(128))
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.Modality, ds.SOPClassUID = 'Roe^Jane', 'ID-4711', '19700231', 'DX', meta.MediaStorageSOPClassUID
    ds.Rows, ds.Columns = image.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.PixelData = 1, 'MONOCHROME2', 8, 8, 7, 0, image.tobytes()
    ds.save_as(folder/'x.dcm', enforce_file_format=True)
    return (folder/'x.dcm').read_bytes()

def test_no_names_in_answers_or_logs(session, url, token, xray, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    dicom = dicom_file(tmp_path, xray)
    replies = [session.post(url + 'explain', c, headers=token) for c in (dicom, dicom[:-5000], dicom.replace(b'DX', b'XX'), png(np.zeros((7, 7), np.uint8)))]
    assert [r.status_code for r in replies] == [200, 422, 200, 500] and 'failed on this picture' in replies[3].json()['error']
    out = capfd.readouterr()
    ours = [r for r in caplog.records if not r.name.startswith(('urllib3', 'PIL'))]
    for text in [r.text for r in replies] + [out.out, out.err, *[r.getMessage() + str(r.exc_text) for r in ours]]:
        assert not re.search('Roe|Jane|4711|1970', re.sub('base64,[^"]*', '', text))
    failures = [r.getMessage() for r in ours if r.name == 'cxr_lab.webapp']
    assert len(failures) == 1 and failures[0].startswith('RuntimeError in explain, line')

def test_it_survives_who_goes_away(session, url, token, xray, caplog):
    host, port = url[7:-1].split(':')
    for _ in range(20):
        with socket.create_connection((host, int(port))) as s: s.sendall(f'POST /explain HTTP/1.1\r\nHost: {host}:{port}\r\nX-CXR-Lab: {token["X-CXR-Lab"]}\r\nContent-Length: 1000\r\n\r\nhalf'.encode())
    until = time.monotonic() + 20
    while (code := session.post(url + 'explain', png(xray), headers=token).status_code) == 503 and time.monotonic() < until: time.sleep(.1)  # busy, until it has noticed
    assert code == 200
    assert {r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING} <= {"Exceeded concurrency limit."}


# From the shell

SERVE = 'import sys; sys.path.insert(0, {tests!r}); from test_webapp import StandIn; from cxr_lab.webapp import serve; serve(StandIn(), port={port}, open_browser=False)'

def test_serving_until_interrupted(session, url):
    process = subprocess.Popen([sys.executable, '-c', SERVE.format(tests=os.path.dirname(__file__), port=0)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        own = process.stdout.readline().split()[0]
        assert own.startswith('http://127.0.0.1:') and 'Drop a chest X-ray here' in session.get(own).text
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally: process.kill()
    assert process.returncode == 0 and out == err == ''
    from cxr_lab.webapp import serve
    with pytest.raises(OSError, match='choose another port'): serve(StandIn(), port=int(url.split(':')[2].strip('/')), open_browser=False)


# In a browser

@pytest.fixture(scope='module')
def browser(url, tmp_path_factory):
    if not site_check.chromium(): pytest.skip('no Chromium here')
    with site_check.Browser(tmp_path_factory.mktemp('empty')) as browser:
        browser.server.server_port, own = int(url.split(':')[2].strip('/')), browser.server.server_port  # what it opens
        yield browser
        browser.server.server_port = own

def wait(browser, script, seconds=30):
    deadline = time.monotonic() + seconds
    while not (found := browser.evaluate(script)) and time.monotonic() < deadline: time.sleep(.05)
    return found

def give(browser, content, name='x.png', how='drop'):
    "Drops or pastes a file, or chooses it."
    browser.evaluate(f'''(() => {{ const d = new DataTransfer(); d.items.add(new File([Uint8Array.from(atob({base64.b64encode(content).decode()!r}), c => c.charCodeAt(0))], {name!r}));
        if ({how!r} === 'choose') {{ $('file').files = d.files; $('file').dispatchEvent(new Event('change')); }}
        else document.body.dispatchEvent({how!r} === 'drop' ? new DragEvent('drop', {{ dataTransfer: d, bubbles: true, cancelable: true }}) : new ClipboardEvent('paste', {{ clipboardData: d, bubbles: true }})) }})()''')

ANSWERED = "!$('result').hidden && $('result').ariaBusy === 'false' && $('gray').complete && $('label').textContent"

@pytest.mark.parametrize('width', [1280, 390])
def test_dropped_chosen_pasted(browser, xray, width):
    expected = StandIn().explain(png(xray))
    for how in ('drop', 'choose', 'paste'):
        assert browser.open('', width) == []
        give(browser, png(xray), how=how)
        assert wait(browser, ANSWERED) == expected.label, how
    assert f'{expected.probability:.3f}' in browser.evaluate("$('number').textContent") and '0.25' in browser.evaluate("$('threshold').textContent")
    assert browser.evaluate("$('warning').innerText").endswith('too square') and browser.evaluate('document.documentElement.scrollWidth') <= width
    assert browser.evaluate("$('gray').naturalWidth") == 192 and expected.label in browser.evaluate("$('explained').textContent")

def test_slider_and_outline(browser, xray):
    assert browser.open('') == []
    give(browser, png(xray))
    assert wait(browser, ANSWERED)
    def set_slider(value): return browser.evaluate(f"$('opacity').value = {value}, $('opacity').dispatchEvent(new Event('input')), [getComputedStyle($('heat')).opacity, document.querySelector('output').textContent]")
    assert set_slider(0) == ['0', '0 %'] and set_slider(85) == ['0.85', '85 %']
    assert browser.evaluate("$('gray').getBoundingClientRect().width === $('heat').getBoundingClientRect().width && $('gray').getBoundingClientRect().height === $('heat').getBoundingClientRect().height")
    assert not browser.evaluate("$('outline').checkVisibility()")
    browser.evaluate("$('lungs').click()")
    assert wait(browser, "$('outline').checkVisibility() && $('outline').firstElementChild.getTotalLength() > 300")
    assert browser.evaluate("$('warning').innerText").endswith('too dark'), 'what the outline tells'
    browser.evaluate("$('lungs').click()")
    assert not browser.evaluate("$('outline').checkVisibility()")

def test_errors_are_shown_and_the_next_picture_is_answered(browser, xray, stand_in):
    assert browser.open('') == []
    for content, said in ((b'Dear colleague', 'was not read'), (bytes(LIMIT + 1), 'the limit is'), (png(np.zeros((7, 7), np.uint8)), 'failed on this picture')):
        before = stand_in.asked
        give(browser, content, 'a.txt')
        assert wait(browser, f"$('status').textContent.includes({said!r})"), said
        assert browser.evaluate("$('result').hidden && $('status').className") == 'wrong' and stand_in.asked == before + (len(content) <= LIMIT)
    give(browser, png(xray))
    assert wait(browser, ANSWERED) and browser.evaluate("$('status').textContent") == ''

def test_the_page_forgets(browser, xray):
    assert browser.open('') == []
    give(browser, png(xray))
    assert wait(browser, ANSWERED) and browser.open('') == []
    assert browser.evaluate("[$('result').hidden, localStorage.length, sessionStorage.length, document.cookie].join()") == 'true,0,0,'


# With a real model

def test_with_a_real_predictor(session, tmp_path, xray):
    import torch
    from cxr_lab.model import build_model
    from cxr_lab.networks import save_model
    from cxr_lab.predict import Predictor
    torch.manual_seed(0)
    save_model(tmp_path/'model.safetensors', build_model('small'), dict(model='small', image_size=128, aspect='stretch', threshold=.5))
    predictor = Predictor.load(tmp_path/'model.safetensors')
    with running(create_app(predictor)) as url:
        token = {'X-CXR-Lab': re.search('data-token="(.+?)"', session.get(url).text)[1]}
        a = session.post(url + 'explain', png(xray), headers=token).json()
        outline = session.post(url + 'outline', png(xray), headers=token).json()
    expected = predictor.predict(xray).iloc[0]
    assert (a['probability'], a['label'], a['threshold']) == (pytest.approx(expected.probability, abs=1e-6), expected.label, .5) and outline['path'].startswith('M')

def test_a_huge_picture_is_refused_when_served(monkeypatch):
    "serve lowers the limit of the predictor, which refuses before it unpacks."
    from cxr_lab import webapp
    from cxr_lab.films import MAX_PIXELS, Refused
    from cxr_lab.predict import Predictor
    class Stop(Exception): pass
    def listen(*_): raise Stop
    monkeypatch.setattr(webapp, '_listen', listen)
    predictor, large = Predictor.load(), png(np.zeros((6400, 6400), np.uint8))
    with pytest.raises(Stop): webapp.serve(predictor)
    assert 6400**2 <= MAX_PIXELS and predictor.max_pixels == webapp.MAX_UPLOAD_PIXELS
    with pytest.raises(Refused, match='6400 x 6400 pixels, more than 40,000,000'): predictor.explain(large)
