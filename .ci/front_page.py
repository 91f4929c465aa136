"The site's root: the pages lie below `nbs/`, as the notebooks do, so the root leads to the landing page. Run after rendering."
import os
from pathlib import Path

out = Path(os.environ['QUARTO_PROJECT_OUTPUT_DIR'])
(out/'index.html').write_text('''<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>cxr_lab</title><meta http-equiv="refresh" content="0; url=nbs/index.html"><link rel="canonical" href="nbs/index.html"></head>
<body><a href="nbs/index.html">cxr_lab</a></body>
</html>
''', encoding='utf-8')
(out/'.nojekyll').touch()  # GitHub Pages serves the files as they are
