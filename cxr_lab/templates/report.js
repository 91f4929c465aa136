const $ = s => document.querySelector(s), $$ = s => [...document.querySelectorAll(s)];
const PAGE = 100, body = $('tbody'), all = [...body.rows];
const by = {
  name: r => r.querySelector('.name').textContent,
  number: r => r.dataset.number === '' ? NaN : +r.dataset.number };
const names = new Intl.Collator('en', { numeric: true });
let order = all, rows = all, first = 0;

function show(from) {
  first = from;
  const last = Math.min(from + PAGE, rows.length);
  body.replaceChildren(...rows.slice(from, last));
  $('output').textContent =
    rows.length ? `${from + 1} to ${last} of ${rows.length}` : 'No such row';
  $('#back').disabled = !from; $('#next').disabled = last === rows.length;
}

function filter() {
  const kind = $('[name=kind]:checked').value;
  const part = $('[type=search]').value.trim().toLowerCase();
  rows = order.filter(r => (kind === 'All' || r.dataset.kind.split(',').includes(kind))
    && (!part || r.cells[1].textContent.toLowerCase().includes(part)));
  show(0);
}

function sort(button) {  // a click each: one way, the other way, as it was
  const head = button.closest('th'), number = button.dataset.by === 'number';
  const ways = number ? ['descending', 'ascending'] : ['ascending', 'descending'];
  const way = { none: ways[0], [ways[0]]: ways[1], [ways[1]]: 'none' }[head.ariaSort];
  for (const h of $$('[aria-sort]')) h.ariaSort = h === head ? way : 'none';
  const key = by[button.dataset.by], sign = way === 'descending' ? -1 : 1;
  const keyed = all.map(r => [key(r), r]);
  const compare = (a, b) => number
    ? isNaN(a) - isNaN(b) || sign * (a - b) || 0  // what was not read: last, either way
    : sign * names.compare(a, b);
  if (way !== 'none') keyed.sort(([a], [b]) => compare(a, b));
  order = keyed.map(k => k[1]); filter();
}

function press(button, on) { button.ariaPressed = on; }

for (const b of $$('thead button')) b.onclick = () => sort(b);
for (const i of $$('.tools input')) i.oninput = filter;
$('#back').onclick = () => show(first - PAGE);
$('#next').onclick = () => show(first + PAGE);
$('#heat').onclick = e => {
  const on = e.currentTarget.ariaPressed !== 'true';
  press(e.currentTarget, on);
  for (const r of all) r.querySelectorAll('.thumb[aria-pressed]').forEach(b => press(b, on));
};
body.onclick = e => {
  const b = e.target.closest('.thumb[aria-pressed]');
  if (b) press(b, b.ariaPressed !== 'true');
};
show(0); body.style.display = 'table-row-group';
