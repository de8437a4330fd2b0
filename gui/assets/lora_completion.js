// <lora: in the prompt offers the names that are known: arrows, Enter or Tab, Esc, or a click.
const list = document.createElement('ul');
list.id = 'lora-names-list';
list.className = 'completion';
list.setAttribute('role', 'listbox');
list.hidden = true;
document.body.append(list);
let at = 0, shown = [], part = null;
let picked = {};        // by the arrows: the same text may be told again, also after a scroll

const prompt = node => node?.matches?.('#prompt textarea') ? node : null;

function names() {
  try { return JSON.parse(element.querySelector('[data-names]').dataset.names); } catch { return []; }
}

function close() {
  list.hidden = true;
  part = null;
  document.querySelector('#prompt textarea')?.setAttribute('aria-expanded', 'false');
}

function open(box) {
  const before = box.value.slice(0, box.selectionStart);
  part = before.match(/<lora:([^:<>]*)$/i);
  if (!part) return close();
  const typed = part[1].trim().toLowerCase();
  shown = names().filter(name => name.toLowerCase().includes(typed))
    .sort((a, b) => b.toLowerCase().startsWith(typed) - a.toLowerCase().startsWith(typed))
    .slice(0, 10);
  if (!shown.length) return close();
  at = picked.text === box.value ? Math.max(0, shown.indexOf(picked.name)) : 0;
  list.replaceChildren(...shown.map((name, n) => {
    const item = document.createElement('li');
    item.id = `lora-name-${n}`;
    item.setAttribute('role', 'option');
    item.textContent = name;
    return item;
  }));
  const place = box.getBoundingClientRect();
  Object.assign(list.style, {left: `${place.left}px`, top: `${place.bottom + 2}px`,
                             width: `${Math.min(place.width, 460)}px`});
  list.hidden = false;
  const told = {'aria-autocomplete': 'list', 'aria-controls': list.id, 'aria-expanded': 'true'};
  for (const [key, value] of Object.entries(told)) box.setAttribute(key, value);
  mark(box);
}

function mark(box) {
  [...list.children].forEach((item, n) => item.setAttribute('aria-selected', n === at));
  list.children[at]?.scrollIntoView({block: 'nearest'});
  box.setAttribute('aria-activedescendant', `lora-name-${at}`);
}

function take(box, name) {
  const end = box.selectionStart, start = end - part[0].length;
  const rest = box.value.slice(end).replace(/^(:[-+.\d]*)?>/, '');
  const tag = `<lora:${name}:0.8>`;
  box.value = box.value.slice(0, start) + tag + rest;
  box.dispatchEvent(new Event('input', {bubbles: true}));
  box.focus();
  box.setSelectionRange(start + tag.length, start + tag.length);
  close();
}

document.addEventListener('input', event => {
  const box = prompt(event.target);
  if (box && !event.isComposing) open(box);
});
document.addEventListener('keydown', event => {
  const box = prompt(event.target);
  if (!box || list.hidden || event.isComposing || event.ctrlKey) return;
  const by = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (by) at = (at + by + shown.length) % shown.length;
  else if (event.key === 'Enter' || event.key === 'Tab') take(box, shown[at]);
  else if (event.key === 'Escape') close();
  else return;
  event.preventDefault();
  event.stopPropagation();
  if (by) {
    picked = {text: box.value, name: shown[at]};
    mark(box);
  }
}, true);
document.addEventListener('focusout', ({target: box}) => {       // back in it, it goes on
  if (prompt(box)) setTimeout(() => { if (document.activeElement !== box) close(); }, 150);
});
document.addEventListener('scroll', () => { if (!list.hidden) close(); });
list.addEventListener('mousedown', event => {
  event.preventDefault();                       // the prompt keeps its focus
  const box = document.querySelector('#prompt textarea'), item = event.target.closest('li');
  if (item) take(box, item.textContent);
});
function fresh() {}
