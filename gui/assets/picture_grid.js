// A page of pictures: arrows move, Space opens, Delete leaves out, Ctrl+A selects all.
const chosen = new Set();
const tiles = () => [...element.querySelectorAll('.tile')];
const keyOf = node => node.closest('.tile')?.dataset.key;
let at = null;

function mark() {
  for (const tile of tiles()) {
    const on = chosen.has(tile.dataset.key);
    tile.classList.toggle('selected', on);
    tile.querySelector('input').checked = on;
  }
  for (const button of element.querySelectorAll('[data-selected]')) {
    button.disabled = chosen.size === 0;
    button.title = chosen.size === 0 ? button.dataset.whynot : '';
    button.querySelector('b').textContent = chosen.size ? ' ' + chosen.size : '';
  }
}

function fresh() {
  const here = new Set(tiles().map(tile => tile.dataset.key));
  for (const key of [...chosen]) if (!here.has(key)) chosen.delete(key);
  mark();
  if (at !== null && !element.contains(document.activeElement)) {
    const tile = tiles().find(one => one.dataset.key === at);
    tile?.querySelector('button').focus({preventScroll: true});
  }
}

element.addEventListener('focusin', event => { at = keyOf(event.target) ?? null; });
element.addEventListener('focusout', event => { if (event.relatedTarget) at = null; });
element.addEventListener('change', event => {
  const key = keyOf(event.target);
  if (!key) return;
  event.target.checked ? chosen.add(key) : chosen.delete(key);
  mark();
});
element.addEventListener('click', event => {
  const button = event.target.closest('[data-act]');
  if (!button || button.disabled) return;
  const id = button.dataset.selected !== undefined ? [...chosen].join(',')
    : button.dataset.id || '';
  trigger('click', {act: button.dataset.act, id});
});
element.addEventListener('keydown', event => {
  const all = tiles(), tile = event.target.closest('.tile');
  if (event.ctrlKey && event.key === 'a') {
    event.preventDefault();
    all.forEach(one => chosen.add(one.dataset.key));
    mark();
    return;
  }
  if (!tile) return;
  const wide = Math.max(1, all.filter(one => one.offsetTop === all[0].offsetTop).length);
  const by = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide}[event.key];
  if (by !== undefined) {
    event.preventDefault();
    all[Math.min(all.length - 1, Math.max(0, all.indexOf(tile) + by))]
      .querySelector('button').focus();
  } else if (event.key === 'Delete') {
    event.preventDefault();
    const ids = chosen.size ? [...chosen] : [tile.dataset.key];
    trigger('click', {act: tile.classList.contains('out') ? 'take_in' : 'leave_out',
                      id: ids.join(',')});
  }
});
