"""Run after rendering. The pages lie below `nbs/`, as the notebooks do, so the site's root leads to the landing page.
Nothing is fetched from the network: formulas that a renderer left to a script become MathML, which every browser draws by itself."""
import html, os, re
from pathlib import Path

out = Path(os.environ['QUARTO_PROJECT_OUTPUT_DIR'])
FORMULA = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)

def mathml(match):
    from latex2mathml.converter import convert
    kind, tex = match.groups()
    return f'<span class="math {kind}">{convert(html.unescape(tex), display="block" if kind == "display" else "inline")}</span>'

for page in (out/'nbs').rglob('*.html'):
    text = page.read_text(encoding='utf-8')
    if FORMULA.search(text):
        text = re.sub(r'<link[^>]*katex[^>]*>|<script[^>]*katex[^>]*></script>', '', FORMULA.sub(mathml, text))
        page.write_text(text, encoding='utf-8')

for style in (out/'site_libs').rglob('*.css'):  # a theme's font from the network would stay away offline, and tell who reads
    text = style.read_text(encoding='utf-8')
    if (without := re.sub(r'@import\s*(url\(["\']?https:[^)]*\)|"https:[^"]*");?', '', text)) != text: style.write_text(without, encoding='utf-8')

(out/'index.html').write_text('''<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>cxr_lab</title><meta http-equiv="refresh" content="0; url=nbs/index.html"><link rel="canonical" href="nbs/index.html"></head>
<body><a href="nbs/index.html">cxr_lab</a></body>
</html>
''', encoding='utf-8')
(out/'.nojekyll').touch()  # GitHub Pages serves the files as they are
