// Rows of captions. What is focused is never overwritten: the rows come as HTML, the texts by a
// second component (#captions-texts), so that saving one row doesn't rebuild the others.
const boxes = () => [...element.querySelectorAll('textarea')];
let want = '';

function texts() {
  const holder = document.querySelector('#captions-texts [data-texts]');
  try { return holder ? JSON.parse(holder.dataset.texts) : {}; } catch { return {}; }
}

function apply() {
  const told = texts();
  for (const box of boxes()) {
    const found = told[box.dataset.key];
    if (!found) continue;
    const typing = box === document.activeElement && box.value !== (box.dataset.saved ?? '');
    const under_way = Date.now() - +(box.dataset.sent || 0) < 2000 && found.text !== box.value;
    if (typing || under_way) continue;
    if (box.value !== found.text) box.value = found.text;
    box.dataset.saved = found.text;
    box.readOnly = Boolean(found.locked);
    const count = box.closest('li').querySelector('.count');
    count.textContent = found.count;
    count.classList.toggle('over', Boolean(found.over));
    count.title = found.said;
  }
}

function save(box) {
  if (box.readOnly || box.value === (box.dataset.saved ?? box.value)) return;
  box.dataset.saved = box.value;
  box.dataset.sent = Date.now();
  trigger('click', {act: 'save', id: `${box.dataset.key} ${box.value}`});
}

function go(box) { box.focus(); box.setSelectionRange(box.value.length, box.value.length); }

function turn(act, then) { want = then; document.activeElement?.blur(); trigger('click', {act, id: ''}); }

element.addEventListener('focusout', event => {
  if (event.target.matches('textarea')) save(event.target);
});
element.addEventListener('click', event => {
  const button = event.target.closest('[data-act]');
  if (button && !button.disabled) trigger('click', {act: button.dataset.act,
                                                    id: button.dataset.id || ''});
});
element.addEventListener('keydown', event => {
  const all = boxes(), here = all.indexOf(event.target);
  if (event.isComposing) return;
  if (event.ctrlKey && event.key.toLowerCase() === 'j') {
    event.preventDefault();
    const next = all.slice(here + 1).find(box => !box.value.trim());
    next ? go(next) : turn('next_empty', 'empty');
  } else if (event.ctrlKey && (event.key === 'ArrowDown' || event.key === 'ArrowUp')) {
    event.preventDefault();
    const by = event.key === 'ArrowDown' ? 1 : -1;
    if (all[here + by]) go(all[here + by]);
    else turn(by > 0 ? 'next' : 'previous', by > 0 ? 'first' : 'last');
  } else if (event.key === 'Escape' && here >= 0) {
    event.target.value = event.target.dataset.saved ?? '';
  } else if (event.key === 'Enter' && here >= 0 && !event.ctrlKey) {
    event.preventDefault();                 // a caption is one line
  }
});
function fresh() {
  apply();
  const all = boxes();
  const target = want === 'first' ? all[0] : want === 'last' ? all[all.length - 1]
    : want === 'empty' ? all.find(box => !box.value.trim()) : null;
  want = '';
  if (target) go(target);
}
document.addEventListener('captions', apply);
