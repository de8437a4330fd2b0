// Buttons, lists and weights that tell what was chosen; a trigger word goes into the prompt.
const send = (act, id) => trigger('click', {act, id: String(id ?? '')});
const timers = {}, told = new WeakMap();

function values(form) {                         // of all named fields of a form
  return JSON.stringify(Object.fromEntries(new FormData(form)));
}

function insert(word) {
  const box = document.querySelector('#prompt textarea');
  if (!box) return;
  const there = box.value.split(',').map(part => part.trim().toLowerCase());
  if (!there.includes(word.toLowerCase())) {
    box.value = box.value.trim() ? `${word}, ${box.value.trimStart()}` : word;
    box.dispatchEvent(new Event('input', {bubbles: true}));
  }
  box.focus();
}

element.addEventListener('click', event => {
  const button = event.target.closest('[data-act], [data-word]');
  if (!button || button.disabled || button.matches('form')) return;
  event.preventDefault();
  if (button.dataset.word !== undefined) return insert(button.dataset.word);
  const form = button.dataset.form !== undefined && button.closest('form');
  send(button.dataset.act, form ? values(form) : button.dataset.id);
});
element.addEventListener('submit', event => {
  event.preventDefault();
  const form = event.target;
  if (form.dataset.fields !== undefined) return send(form.dataset.act, values(form));
  const box = form.querySelector('input');
  if (box.value.trim()) send(form.dataset.act, box.value.trim());
  box.value = '';
});
element.addEventListener('change', event => {
  const list = event.target;
  if (list.dataset.folders !== undefined) {     // a program's own folder
    const folder = list.selectedOptions[0]?.dataset.folder;
    list.form.elements.folder.value = folder || '';
  }
  if (list.dataset.pick === undefined || !list.value) return;
  send(list.dataset.pick, list.value);
  if (list.dataset.value === undefined) list.value = '';
});
element.addEventListener('input', event => {
  const box = event.target, number = box.dataset.weight;
  if (number === undefined || box.value === '' || !box.validity.valid) return;
  for (const other of element.querySelectorAll(`[data-weight="${number}"]`))
    if (other !== box) other.value = box.value;
  clearTimeout(timers[number]);
  timers[number] = setTimeout(() => {
    delete timers[number];
    send('weight', `${number} ${box.value}`);
  }, 150);
});
function fresh() {                              // what the page knows better stays
  for (const box of element.querySelectorAll('[data-weight], select[data-value]')) {
    if (box === document.activeElement && box.type === 'number') continue;
    if (box.dataset.weight in timers || told.get(box) === box.dataset.value) continue;
    told.set(box, box.dataset.value);
    box.value = box.dataset.value;
  }
}
