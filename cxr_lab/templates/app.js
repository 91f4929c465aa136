const $ = id => document.getElementById(id), { token, limit } = document.body.dataset;
let content = null, asked = null;

function say(text, wrong = false) {
  $('status').textContent = text;
  $('status').className = wrong ? 'wrong' : '';
}

async function ask(what) {
  const headers = { 'X-CXR-Lab': token, 'Content-Type': 'application/octet-stream' };
  const { signal } = asked;
  const reply = await fetch(
    what, { method: 'POST', body: content, headers, signal, cache: 'no-store' }
  ).catch(e => {
    throw e.name === 'AbortError' ? e : new Error('No answer. Is cxr-lab app still running?');
  });
  const unreadable = { error: `No answer (${reply.status}). Reload the page.` };
  const found = await reply.json().catch(() => unreadable);
  if (!reply.ok) throw new Error(found.error);
  return found;
}

const megabytes = bytes => bytes / 1048576;

async function look(file) {
  asked?.abort(); asked = new AbortController();
  const mine = asked;
  $('result').ariaBusy = 'true';
  try {
    if (file.size > limit) {
      const size = Math.ceil(megabytes(file.size));
      throw new Error(`The file has ${size} MB; the limit is ${megabytes(limit)} MB.`);
    }
    say('Looking …');
    content = await file.arrayBuffer().catch(() => {
      throw new Error('This cannot be read. Is it a folder?');
    });
    if (mine !== asked) return;
    tell(await ask('/explain'));
    say('');
    if ($('lungs').checked) await outline();
  } catch (e) {
    if (e.name !== 'AbortError' && mine === asked) {
      say(e.message, true);
      $('result').hidden = true;
      $('drop').classList.remove('small');
    }
  } finally { if (mine === asked) $('result').ariaBusy = 'false'; }
}

function tell(a) {
  const of = a.explained;
  $('gray').src = a.gray; $('heat').src = a.heat;
  $('label').textContent = a.label;
  $('label').className = `answer ${a.label}`; $('scale').className = `scale ${a.label}`;
  $('number').textContent = `probability of PNEUMONIA ${a.probability.toFixed(3)}`;
  $('scale').querySelector('rect').setAttribute('width', a.probability);
  for (const x of ['x1', 'x2']) $('scale').querySelector('line').setAttribute(x, a.threshold);
  $('threshold').textContent = `Threshold ${+a.threshold.toPrecision(3)}, the mark on the scale.`;
  $('explained').textContent =
    a.zero ? 'The heatmap is empty.' : `Heatmap: what raised the score of ${of}.`;
  $('heat').alt = `Heatmap: what raised the score of ${of}`;
  warn(a.warning);
  $('notes').textContent = a.notes;
  $('outline').setAttribute('viewBox', `0 0 ${a.width} ${a.height}`);
  $('outline').firstElementChild.setAttribute('d', '');
  $('finding').textContent = '';
  $('result').hidden = false; $('drop').classList.add('small'); fade();
  $('result').scrollIntoView({ block: 'nearest' });
}

function warn(text) {
  $('warning').hidden = !text;
  const item = t => Object.assign(document.createElement('li'), { textContent: t });
  $('warning').querySelector('ul').replaceChildren(...text.split('; ').map(item));
}

async function outline() {
  const path = $('outline').firstElementChild, on = $('lungs').checked;
  $('outline').toggleAttribute('hidden', !on);
  if (!on || path.getAttribute('d')) return;
  $('finding').textContent = 'looking …';
  try {
    const { path: d, warning } = await ask('/outline');
    path.setAttribute('d', d);
    warn(warning);
    $('finding').textContent = d ? '' : 'none found';
  } catch (e) { if (e.name !== 'AbortError') $('finding').textContent = e.message; }
}

function fade() {
  $('heat').style.opacity = $('opacity').value / 100;
  document.querySelector('output').textContent = `${$('opacity').value} %`;
}

$('opacity').oninput = fade;
$('lungs').onchange = outline;
$('file').onchange = e => { if (e.target.files[0]) look(e.target.files[0]); e.target.value = ''; };
addEventListener('dragover', e => { e.preventDefault(); $('drop').classList.add('over'); });
addEventListener('dragleave', () => $('drop').classList.remove('over'));
addEventListener('drop', e => {
  e.preventDefault();
  $('drop').classList.remove('over');
  const f = e.dataTransfer.files[0];
  if (f) look(f);
});
addEventListener('paste', e => {
  const f = e.clipboardData.files[0];
  f ? look(f) : say('There is no picture in the clipboard.', true);
});
