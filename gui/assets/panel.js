// One listener on the area itself: what is painted anew needs none.
element.addEventListener('click', event => {
  const button = event.target.closest('[data-act]');
  if (!button || button.disabled || !element.contains(button) || button.matches('form')) return;
  event.preventDefault();
  if (button.dataset.once !== undefined) button.disabled = true;
  trigger('click', {act: button.dataset.act, id: button.dataset.id || ''});
});
element.addEventListener('submit', event => {
  const form = event.target.closest('form[data-act]');
  if (!form) return;
  event.preventDefault();
  trigger('click', {act: form.dataset.act, id: form.querySelector('input').value});
});
