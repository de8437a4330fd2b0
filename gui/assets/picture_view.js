// One picture: a click sets the point that the crop keeps; arrow keys move it by 5 %.
function point(x, y) {
  const figure = element.querySelector('[data-key]');
  const inside = value => Math.min(1, Math.max(0, value)).toFixed(4);
  trigger('click', {act: 'focus', id: `${figure.dataset.key}/${inside(x)}/${inside(y)}`});
}
element.addEventListener('click', event => {
  const button = event.target.closest('[data-act]');
  if (button && !button.disabled) {
    trigger('click', {act: button.dataset.act, id: button.dataset.id || ''});
    return;
  }
  const figure = event.target.closest('.aim');
  if (!figure) return;
  const box = figure.getBoundingClientRect();
  point((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
});
let aimed = false;
element.addEventListener('keydown', event => {
  const figure = event.target.closest('.aim');
  if (event.key === 'Escape') trigger('click', {act: 'close', id: ''});
  if (!figure) return;
  const by = {ArrowLeft: [-.05, 0], ArrowRight: [.05, 0], ArrowUp: [0, -.05],
              ArrowDown: [0, .05]}[event.key];
  if (!by) return;
  event.preventDefault();
  aimed = true;
  const x = +(figure.dataset.x || .5) + by[0], y = +(figure.dataset.y || .5) + by[1];
  figure.dataset.x = x; figure.dataset.y = y;
  point(x, y);
});
function fresh() {
  if (aimed) element.querySelector('.aim')?.focus({preventScroll: true});
  aimed = false;
}
