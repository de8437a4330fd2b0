// One picture: arrows turn to the next, Esc closes it.
element.addEventListener('click', event => {
  const button = event.target.closest('[data-act]');
  if (button && !button.disabled) trigger('click', {act: button.dataset.act,
                                                    id: button.dataset.id || ''});
});
element.addEventListener('keydown', event => {
  if (!element.querySelector('[data-act=close]') || event.target.matches('input')) return;
  const by = {ArrowLeft: '-1', ArrowRight: '1'}[event.key];
  if (by) trigger('click', {act: 'step', id: by});
  else if (event.key === 'Escape') trigger('click', {act: 'close', id: ''});
  else return;
  event.preventDefault();
});
let open = '';
function fresh() {                              // what was opened by hand comes into view
  const now = element.querySelector('[data-act=close]')
    && element.querySelector('.drawn').dataset.key || '';
  if (now && now !== open) {
    const picture = element.querySelector('.drawn');
    picture.focus({preventScroll: true});
    picture.scrollIntoView({block: 'nearest'});
  }
  open = now;
}
