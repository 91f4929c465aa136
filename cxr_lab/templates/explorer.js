const $ = id => document.getElementById(id), canvas = $('map'), pen = canvas.getContext('2d');
let data, shown = [], current = null, kept = false, pictures = new Map();
const model = () => data.models[$('model').value];
const codes = by => by === 'answer' ? model().answer : data.groups[by];
const group = (by, i) => Object.keys(data.palettes[by])[codes(by)[i]];

function place(i) {  // both axes on one scale, the map in the middle
  const {xy, box: [w, h]} = model(), pad = 10 * devicePixelRatio;
  const scale = Math.min((canvas.width - 2 * pad) / w, (canvas.height - 2 * pad) / h);
  return [canvas.width / 2 + (xy[2 * i] - w / 2) * scale,
          canvas.height / 2 - (xy[2 * i + 1] - h / 2) * scale];
}

function dot(i, radius) {
  pen.beginPath(); pen.arc(...place(i), radius * devicePixelRatio, 0, 7);
}

function draw() {
  const by = $('by').value, split = $('split').value,
        colors = Object.values(data.palettes[by]), counts = colors.map(() => 0);
  canvas.width = canvas.clientWidth * devicePixelRatio;
  canvas.height = canvas.clientHeight * devicePixelRatio;
  shown = data.path.map((_, i) => i).filter(
    i => (split === 'all' || group('split', i) === split)
      && (!$('errors').checked || model().answer[i]));
  for (const i of shown) counts[codes(by)[i]]++;
  const order = colors.map((_, g) => g).sort((a, b) => counts[b] - counts[a]);  // small ones on top
  pen.globalAlpha = .7;
  for (const g of order) {
    pen.fillStyle = colors[g];
    for (const i of shown)
      if (codes(by)[i] === g) { dot(i, shown.length > 1500 ? 2 : 3.5); pen.fill(); }
  }
  pen.globalAlpha = 1;
  if (current !== null) {
    pen.lineWidth = 2 * devicePixelRatio; pen.strokeStyle = '#000';
    dot(current, 7); pen.stroke();
  }
  const names = Object.keys(data.palettes[by]);
  $('legend').replaceChildren(...names.filter((_, g) => counts[g]).map(name => {
    const entry = document.createElement('span');
    entry.style.setProperty('--c', data.palettes[by][name]);
    entry.textContent = `${name} (${counts[names.indexOf(name)]})`;
    return entry;
  }));
}

function nearest(event) {
  const r = canvas.getBoundingClientRect();
  const x = (event.clientX - r.left) * devicePixelRatio;
  const y = (event.clientY - r.top) * devicePixelRatio;
  let best = null, least = (event.pointerType === 'touch' ? 24 : 12) * devicePixelRatio;
  for (const i of shown) {
    const [a, b] = place(i), d = Math.hypot(a - x, b - y);
    if (d < least) [best, least] = [i, d];
  }
  return best;
}

function tell(i) {
  current = i;
  const n = pictures.get(i), percent = model().percent[i];
  const facts = {
    file: data.path[i], 'true label': group('class', i), subtype: group('subtype', i),
    split: group('split', i), 'probability of PNEUMONIA': (percent / 1000).toFixed(3),
    answer: group('answer', i)};
  const lines = Object.entries(facts).flatMap(([k, v]) => [['dt', k], ['dd', v]]);
  $('facts').replaceChildren(...lines.map(([tag, text]) => {
    const e = document.createElement(tag);
    e.textContent = text;
    return e;
  }));
  $('thumb').hidden = n === undefined;
  if (n !== undefined) {
    const {columns} = data.sprite, x = n % columns * 160, y = Math.floor(n / columns) * 160;
    $('thumb').style.backgroundPosition = `-${x}px -${y}px`;
  }
  draw();
}

async function start() {
  const bytes = Uint8Array.from(atob($('data').textContent), c => c.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  data = await new Response(unpacked).json();
  $('model').replaceChildren(...data.models.map((m, i) => new Option(m.title, i)));
  if (data.models.length > 1) $('model').value = 1;
  $('by').replaceChildren(...Object.keys(data.palettes).map(name => new Option(name)));
  $('split').value = data.start;
  $('note').textContent = data.note;
  if (data.sprite) {
    data.sprite.rows.forEach((row, n) => pictures.set(row, n));
    $('thumb').style.backgroundImage = `url(${data.sprite.src})`;
    $('thumb').style.backgroundSize = `${data.sprite.columns * 160}px auto`;
  }
  for (const id of ['model', 'by', 'split', 'errors'])
    $(id).oninput = () => current === null ? draw() : tell(current);
  canvas.onpointermove = e => {
    const i = kept ? null : nearest(e);
    if (i !== null && i !== current) tell(i);
  };
  canvas.onclick = e => {
    const i = nearest(e);
    kept = i !== null;
    if (kept) tell(i);
  };
  canvas.onkeydown = e => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[e.key];
    if (!step || !shown.length) return;
    e.preventDefault();
    kept = true;
    tell(shown.at((shown.indexOf(current) + step) % shown.length));
  };
  new ResizeObserver(draw).observe($('plot'));
}
start();
