"Embeddings of all images for three models and their t-SNE maps: cxr_lab.tsne, the loop one would write, scikit-learn's TSNE, and openTSNE where it is installed."
import os, time

import numpy as np
from common import arguments, dataset, image_folder, report, seconds

def plain(model, pixels, batch):
    "The penultimate layer by a hook, images as they come."
    import torch
    kept = []
    hook = model.head.register_forward_hook(lambda module, given, out: kept.append(given[0]))
    model.eval()
    with torch.no_grad():
        for i in range(0, len(pixels), batch): model(torch.from_numpy(np.array(pixels[i:i + batch])).float() / 255)
    hook.remove()
    return torch.cat(kept).numpy()

def kept_neighbors(vectors, xy, k=15):
    from cxr_lab.tsne import agreement
    rows = np.random.default_rng(0).choice(len(vectors), min(2000, len(vectors)), replace=False)
    return agreement(vectors[rows], xy[rows], k)[0]

def clocked(work):
    begin, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - begin, time.process_time() - cpu

if __name__ == '__main__':
    a = arguments(__doc__, images=(5216, 'training images'), models=(3, 'models'), batch=(256, 'images per batch'), perplexity=(30, 'of the maps'), repeats=(3, 'repetitions of the embeddings'))
    load = round(os.getloadavg()[0], 1)
    with image_folder(a.images) as (root, what, work):
        import torch
        from sklearn.manifold import TSNE
        from cxr_lab.model import build_model
        from cxr_lab.tsne import embed, tsne_map
        data, _ = dataset(root)
        torch.manual_seed(0)
        models = [build_model('small') for _ in range(a.models)]
        vectors = [embed(m, data.pixels, a.batch)[0] for m in models]
        for m, v in zip(models, vectors): assert np.allclose(plain(m, data.pixels, a.batch), v, atol=1e-4), 'both find the same embeddings'
        loop = seconds(lambda: [plain(m, data.pixels, a.batch) for m in models], a.repeats)
        for m in models: m.to(memory_format=torch.channels_last)
        ours = seconds(lambda: [embed(m, data.pixels, a.batch) for m in models], a.repeats)
        makers = {'scikit-learn TSNE': lambda v: TSNE(2, perplexity=a.perplexity, init='pca', random_state=0).fit_transform(v), 'cxr_lab.tsne.tsne_map': lambda v: tsne_map(v, a.perplexity)}
        try:
            import openTSNE
            makers[f'openTSNE {openTSNE.__version__}'] = lambda v: np.asarray(openTSNE.TSNE(perplexity=a.perplexity, initialization='pca', random_state=0, n_jobs=os.cpu_count()).fit(v))
        except ImportError: pass
        makers['cxr_lab.tsne.tsne_map, again'] = makers['cxr_lab.tsne.tsne_map']
        rows, maps = [{'what': f'embeddings, {name}', 'images': len(data.index) * a.models, 'seconds': t, 'images/s': len(data.index) * a.models / t} for name, t in (('plain loop', loop), ('cxr_lab.tsne.embed', ours))], {}
        for name, make in makers.items():
            done = [clocked(lambda: make(v)) for v in vectors]
            maps[name] = done[0][0]
            rows.append({'what': f't-SNE, {name}', 'images': len(data.index) * a.models, 'seconds': sum(d[1] for d in done), 'processor seconds': sum(d[2] for d in done), '15 neighbors kept': kept_neighbors(vectors[0], maps[name])})
        assert np.array_equal(maps['cxr_lab.tsne.tsne_map'], maps['cxr_lab.tsne.tsne_map, again']), 'the same map every time'
    times = {r['what']: r['seconds'] for r in rows}
    ratio, total = times['t-SNE, scikit-learn TSNE'] / times['t-SNE, cxr_lab.tsne.tsne_map'], ours + times['t-SNE, cxr_lab.tsne.tsne_map']
    columns = list(dict.fromkeys(k for r in rows for k in r))
    checks = {f'seconds for embeddings and maps of {a.models} models': (total, 360, total <= 360), "times as fast as scikit-learn's TSNE": (ratio, .95, ratio >= .95)}
    report('tsne', f'Embeddings and t-SNE ({what})', [{c: r.get(c, '') for c in columns} for r in rows], checks, a.write, load=load, images=a.images, models=a.models, batch=a.batch, perplexity=a.perplexity, repeats=a.repeats)
