"""Renders the site without Quarto and checks it: `python tests/site_check.py [FOLDER]` leaves the pages in FOLDER (default `_staging`).

The notebooks go through the filter that Quarto would call, into a staging folder, where smalldocs renders them from the same `_quarto.yml`.
Then every internal link, anchor and picture of the HTML must hold. In Chromium, if there is one, every page is opened on a desktop and on a phone.
"""
import json, os, shutil, subprocess, sys, tempfile, threading, time
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[1]
MAX_PAGE = 3_300_000  # bytes of one page's HTML, pictures included: a notebook's 3 MB (report.MAX_NOTEBOOK) and its markup


# Rendering

def notebooks(root: Path = ROOT) -> list[Path]:
    "The notebooks that are pages, relative to the checkout, in the order of `_quarto.yml`'s render list."
    patterns = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['project']['render']
    return [path.relative_to(root) for pattern in patterns for path in sorted(root.glob(pattern))]

def sidebar(root: Path = ROOT) -> list[str]:
    "The pages that the sidebar lists, in order."
    def pages(items):
        for item in items:
            if isinstance(item, str): yield item
            elif 'contents' in item: yield from pages(item['contents'])
            else: yield item['href']
    return list(pages(yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']))

def stage(staging: Path, root: Path = ROOT):
    "Filtered notebooks, pictures, styles and the configuration; what only Quarto knows is taken out of the latter."
    config = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))
    for key in ('ipynb-filters', 'execute'): config.pop(key)  # the filter is applied here; nothing would be executed anyway
    html = config['format']['html']
    for key in ('code-tools', 'html-math-method'): html.pop(key, None)  # the formulas become MathML after rendering
    staging.mkdir(parents=True)
    (staging/'_quarto.yml').write_text(yaml.safe_dump(config, sort_keys=False), encoding='utf-8')
    for pattern in ('.ci/*.py', 'nbs/*.css', 'nbs/*.json', 'nbs/images/*'):
        for path in root.glob(pattern):
            target = staging/path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for page, text in filtered(root).items():
        (staging/page).parent.mkdir(parents=True, exist_ok=True)
        notebook = json.loads(text)
        for cell in notebook['cells']:  # smalldocs folds the code of a notebook only where the cell says so
            if cell['cell_type'] == 'code': cell['source'] = f'#| code-fold: {html["code-fold"]}\n' + ''.join(cell['source'])
        (staging/page).write_text(json.dumps(notebook), encoding='utf-8')

FILTER = """
import contextlib, json, sys
from nbdev.cli import nbdev_filter
for page in sys.argv[1:]:
    with contextlib.redirect_stdout(sys.stderr): text = nbdev_filter(fname=page, printit=False)
    print(json.dumps(text), flush=True)
"""

def filtered(root: Path) -> dict:  # page -> text of the notebook
    "All pages as Quarto's filter leaves them; one process, since nbdev takes a second to load."
    pages = [page.as_posix() for page in notebooks(root)]
    command = [sys.executable, '-W', 'ignore', '-c', FILTER, *pages]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, encoding='utf-8')
    texts = [json.loads(line) for line in ran.stdout.splitlines()]
    if ran.returncode:
        failed = pages[len(texts)]
        raise RuntimeError(f'nbdev_filter failed on {failed}:\n{ran.stderr[-2000:]}')
    return dict(zip(pages, texts, strict=True))

def render(staging: Path) -> Path:
    "Renders the staged pages, warnings being errors; returns the folder of the HTML."
    ran = subprocess.run([sys.executable, '-m', 'smalldocs.cli', 'render', '--strict', str(staging)], capture_output=True, text=True)
    if ran.returncode: raise RuntimeError(f'smalldocs render --strict:\n{ran.stdout}{ran.stderr}')
    return staging/'_docs'


# Links, anchors, pictures

class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.refs, self.no_alt, self.images = set(), [], 0, 0

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k) and (k == 'id' or tag == 'a')}
        if tag == 'img': self.images += 1; self.no_alt += not a.get('alt')
        self.refs += [(tag, a[k]) for k in ('href', 'src') if a.get(k) is not None]

def read_page(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding='utf-8'))
    return page

def broken_links(site: Path) -> list[str]:
    "What is wrong with the rendered pages: a line for each internal link, anchor or file that is not there, for pictures without description, and for each page that is too heavy."
    pages = {path.relative_to(site).as_posix(): read_page(path) for path in sorted(site.rglob('*.html')) if 'site_libs' not in path.parts}
    problems = [] if pages else [f'no pages in {site.name}']
    for name, page in pages.items():
        if (size := (site/name).stat().st_size) > MAX_PAGE: problems.append(f'{name}: {size/1e6:.1f} MB')
        if page.no_alt: problems.append(f'{name}: {page.no_alt} of {page.images} pictures have no alternative text')
        for tag, ref in page.refs:
            url = urlsplit(ref)
            if url.scheme or url.netloc: continue
            target = os.path.normpath(PurePosixPath(name).parent/unquote(url.path)) if url.path else name
            if (site/target).is_dir(): target = f'{target}/index.html'
            if url.path.startswith('/') or target.startswith('..') or not (site/target).is_file(): problems.append(f'{name}: <{tag}> {ref}: no such file')
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids: problems.append(f'{name}: <{tag}> {ref}: no such anchor')
    return problems


# In a browser

def chromium() -> str | None:
    "The command of an installed Chromium or Chrome, or None."
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'))), None)

_LOOK = '''(limit => {
  const scrolls = e => { for (; e && e !== document.body; e = e.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)) return true; return false };
  const wide = [...document.querySelectorAll('main *')].filter(e => { const r = e.getBoundingClientRect();
    return r.width && r.right > limit + 1 && !scrolls(e.parentElement) });
  return {width: document.documentElement.scrollWidth, wide: wide.slice(0, 3).map(e => e.outerHTML.slice(0, 90)),
    images: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 80))};
})'''

_READER = {
    'folding': """(() => { const d = document.querySelector('details.code-fold'); if (!d?.open) return false;
                           d.querySelector('summary').click(); return !d.open && !d.querySelector('pre').checkVisibility({contentVisibilityAuto: true}) })()""",
    'copying': "!!document.querySelector('main button.code-copy-button')",
    'searching': """(async () => { const input = document.querySelector('#quarto-search input, input[type=search]'); if (!input) return false;
                              input.focus(); input.value = 'receptive'; input.dispatchEvent(new Event('input', {bubbles: true}));
                              const found = () => [...document.querySelectorAll('[class*=search] a, [id*=search] a')].some(a => a.href.includes('02_model'));
                              for (let i = 0; i < 50 && !found(); i++) await new Promise(done => setTimeout(done, 100)); return found() })()""",
    'the dark theme': """(() => { const dark = () => getComputedStyle(document.body).backgroundColor, before = dark();
                                  document.querySelector('.quarto-color-scheme-toggle').click(); return new Promise(done => setTimeout(() => done(dark() !== before), 500)) })()"""}

class Browser:
    "A headless Chromium that serves and opens the pages of one folder, as a context manager."
    def __init__(self, site: Path): self.site = site

    def __enter__(self):
        import websocket  # a dependency of JupyterLab
        handler = type('Quiet', (SimpleHTTPRequestHandler,), {'log_message': lambda *_: None})
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), partial(handler, directory=str(self.site)))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.profile = tempfile.mkdtemp()
        self.process = subprocess.Popen([chromium(), '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--hide-scrollbars', '--no-first-run',
            '--remote-debugging-port=0', '--remote-allow-origins=*', f'--user-data-dir={self.profile}', 'about:blank'],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = Path(self.profile)/'DevToolsActivePort'
            deadline = time.monotonic() + 60
            while not (port.exists() and len(lines := port.read_text().split('\n')) > 1):
                if time.monotonic() > deadline or self.process.poll() is not None: raise RuntimeError('Chromium did not start')
                time.sleep(.1)
            self.socket, self.calls, self.events = websocket.create_connection(f'ws://127.0.0.1:{lines[0]}{lines[1]}', timeout=60), 0, []
            target = self.call('Target.createTarget', url='about:blank')['targetId']
            self.session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
            for domain in ('Page', 'Runtime', 'Log', 'Network'): self.call(f'{domain}.enable')
            self.call('Network.setBlockedURLs', urls=['https://*'])  # a page needs no network
        except BaseException: self.__exit__(); raise
        return self

    def __exit__(self, *_):
        if hasattr(self, 'socket'): self.socket.close()
        self.process.terminate()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: self.process.kill(); self.process.wait()
        self.server.shutdown(); self.server.server_close()
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method, **params):
        self.calls += 1
        message = dict(id=self.calls, method=method, params=params) | ({'sessionId': self.session} if hasattr(self, 'session') else {})
        self.socket.send(json.dumps(message))
        while (reply := json.loads(self.socket.recv())).get('id') != self.calls: self.events.append(reply)
        if 'error' in reply: raise RuntimeError(f'{method}: {reply["error"]["message"]}')
        return reply['result']

    def evaluate(self, script):
        return self.call('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)['result'].get('value')

    def open(self, page: str, width: int = 1280, height: int = 900, dark: bool = False) -> list[str]:
        "Opens a page; returns what is wrong with it."
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value='dark' if dark else 'light')])
        self.events.clear()
        self.call('Page.navigate', url=f'http://127.0.0.1:{self.server.server_port}/{page}')
        deadline = time.monotonic() + 60
        while not any(e.get('method') == 'Page.loadEventFired' for e in self.events):
            if time.monotonic() > deadline: return [f'{page}: was not loaded']
            self.evaluate('new Promise(done => setTimeout(done, 50))')
        found = self.evaluate(f'({_LOOK})({width})')
        at = f'{page} at {width} px'
        problems = [f'{at}: {found["width"]} px wide'] if found['width'] > width else []
        problems += [f'{at}: reaches beyond the edge: {text}' for text in found['wide']] + [f'{at}: picture not shown: {src}' for src in found['images']]
        for event in self.events:
            kind, p = event.get('method'), event.get('params', {})
            if kind == 'Runtime.exceptionThrown': problems.append(f'{at}: {p["exceptionDetails"]["text"]} {p["exceptionDetails"].get("exception", {}).get("description", "")}')
            if kind == 'Runtime.consoleAPICalled' and p['type'] == 'error': problems.append(f'{at}: console error {p["args"]}')
            if kind == 'Log.entryAdded' and p['entry']['level'] == 'error' and not p['entry'].get('url', '').endswith('/favicon.ico'): problems.append(f'{at}: {p["entry"]["text"]} {p["entry"].get("url", "")}')
        return problems

    def works(self, page: str) -> list[str]:
        "Tries what a reader does on an open page: folds code, copies it, searches, turns the page dark; returns what does not answer."
        return [f'{page}: {what} does not work' for what, script in _READER.items() if self.evaluate(script) is not True]

    def screenshot(self, target: Path, whole: bool = True):
        "A picture of the open page."
        import base64
        data = self.call('Page.captureScreenshot', format='png', captureBeyondViewport=whole, **({'clip': dict(x=0, y=0, scale=1, **self.size())} if whole else {}))['data']
        target.write_bytes(base64.b64decode(data))

    def size(self): return self.evaluate('({width: innerWidth, height: Math.min(document.documentElement.scrollHeight, 16000)})')

def seen_in_browser(site: Path) -> list[str]:
    "What is wrong with the pages, each opened on a desktop and on a phone."
    with Browser(site) as browser:
        pages = [path.relative_to(site).as_posix() for path in sorted((site/'nbs').rglob('*.html'))]
        problems = [problem for page in pages for width in (1280, 390) for problem in browser.open(page, width)]
        return problems + [problem for page in pages[:1] for problem in browser.open(page, dark=True) + browser.works(page)]


if __name__ == '__main__':
    staging = Path(sys.argv[1] if len(sys.argv) > 1 else '_staging').resolve()
    if staging.exists() and not (staging/'_quarto.yml').is_file(): sys.exit(f'{staging.name} exists and is not a staging folder')
    shutil.rmtree(staging, ignore_errors=True)
    stage(staging)
    site = render(staging)
    problems = broken_links(site) + (seen_in_browser(site) if chromium() else [])
    pages = {path.relative_to(site).as_posix(): read_page(path) for path in sorted((site/'nbs').rglob('*.html'))}
    for name, page in pages.items(): print(f'{name:28} {(site/name).stat().st_size/1e6:5.2f} MB  {page.images:3} pictures, {page.no_alt:3} without alternative text')
    print('\n'.join(problems) or 'all internal links, anchors and pictures hold' + (', in Chromium too' if chromium() else ' (no Chromium: not opened in a browser)'))
    sys.exit(bool(problems))
