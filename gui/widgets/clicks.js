// Buttons of a panel report what they are.
element.addEventListener('click', event => {
  const button = event.target.closest('[data-act]');
  if (!button || button.disabled) return;
  trigger('click', {act: button.dataset.act, id: button.dataset.id || ''});
});
