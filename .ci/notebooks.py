"Notebooks hold what belongs into the repository: what nbdev_clean leaves, outputs of one run from top to bottom, no traces of a machine, no errors, no warnings."
import copy, json, re, sys
from pathlib import Path

import nbformat
from nbdev.clean import clean_nb
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parents[1]
MACHINE = re.compile(r'(?<![\w.:/-])/(?:home|root|tmp|work|Users|mnt|private|scratch)/')

def _bare(notebook):
    "A notebook without execution counts, sources and texts in one piece."
    for cell in notebook['cells']:
        cell.pop('execution_count', None)
        for output in cell.get('outputs', []): output.pop('execution_count', None)
    return nbformat.reads(json.dumps(notebook), 4)

def problems(path: Path) -> list[str]:
    "What does not belong into the notebook, a line each."
    text = path.read_text(encoding='utf-8')
    notebook = json.loads(text)
    cleaned = copy.deepcopy(notebook)
    config = get_config(path=path)
    clean_nb(cleaned, allowed_cell_metadata_keys=config.allowed_cell_metadata_keys.split(), clean_ids=config.clean_ids)
    found = []
    before, after = _bare(copy.deepcopy(notebook)), _bare(cleaned)
    found += [f'cell {i}: nbdev_clean would change it' for i, (a, b) in enumerate(zip(before.cells, after.cells)) if a != b]
    if before.metadata != after.metadata: found.append(f'metadata: {json.dumps(before.metadata)[:200]}; nbdev_clean leaves {json.dumps(after.metadata)[:200]}')
    code = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code' and ''.join(cell['source']).strip()]
    counts = [cell['execution_count'] for cell in code]
    if any(counts) and counts != list(range(1, len(code) + 1)): found.append(f'execution counts {counts}: not one run from top to bottom')
    for cell in code:
        where = ''.join(cell['source']).strip().splitlines()[0][:60]
        for output in cell['outputs']:
            if output['output_type'] == 'error': found.append(f'{where!r}: error {output["ename"]}')
            if output.get('name') == 'stderr': found.append(f'{where!r}: text on stderr')
            words = json.dumps([output.get('text')] + [v for k, v in output.get('data', {}).items() if not k.startswith('image/')])
            if match := MACHINE.search(words): found.append(f'{where!r}: {words[max(0, match.start() - 20):match.start() + 40]}')
    return found

if __name__ == '__main__':
    found = {path.relative_to(ROOT).as_posix(): problems(path) for path in sorted((ROOT/'nbs').glob('**/*.ipynb')) if '.ipynb_checkpoints' not in path.parts}
    for name, lines in found.items(): print(name, *(lines or ['clean']), sep='\n  ')
    sys.exit(any(found.values()))
