// The page's panels, tab names and messages. Once a second, and after each handler, the page tells
// what it shows; the server answers with what differs. Panels mount themselves (widgets/panel.py).
window.darkroom = (() => {
  const address = location.pathname.replace(/\/*$/, '/') + 'live';
  const told = {}, marks = {}, places = {};
  const wanted = {}, asked = {};                // what the page has to show: repaint, refill
  let version = '', busy = false, again = false, misses = 0, typed = null;

  // Nodes that stay keep their focus, scroll position and open folds.
  function morph(old, fresh) {
    if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName
        || (old.dataset && old.dataset.key !== fresh.dataset.key)) {
      old.replaceWith(fresh);
      return;
    }
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
      return;
    }
    if (old.isEqualNode(fresh)) return;
    const mine = {DETAILS: ['open'], DIALOG: ['open'], INPUT: ['value']}[old.nodeName] || [];
    for (const {name} of [...old.attributes])
      if (!fresh.hasAttribute(name) && !mine.includes(name)) old.removeAttribute(name);
    for (const {name, value} of fresh.attributes)
      if (old.getAttribute(name) !== value && !mine.includes(name)) old.setAttribute(name, value);
    if (old.nodeName !== 'TEXTAREA') children(old, fresh);
  }

  function children(old, fresh) {
    const news = [...fresh.childNodes];
    [...old.childNodes].slice(news.length).forEach(node => node.remove());
    const olds = [...old.childNodes];
    news.forEach((node, n) => n < olds.length ? morph(olds[n], node) : old.append(node));
  }

  function put(id) {
    const place = places[id], html = told[id];
    if (html === undefined || !place || place.shown === html) return;
    const fresh = document.createElement('template');
    fresh.innerHTML = html;
    children(place.element, fresh.content);
    place.shown = html;
    for (const dialog of place.element.querySelectorAll('dialog:not([open])')) ask(dialog);
    place.after();
  }

  function ask(dialog) {                        // Escape is its Cancel, where it has one
    dialog.showModal();
    dialog.addEventListener('cancel', event => {
      event.preventDefault();
      dialog.querySelector('[data-cancel]')?.click();
    });
  }

  function name(id, text) {                     // a tab's; the button may come late
    const tab = document.getElementById(id);
    if (tab && tab.textContent.trim() !== text) tab.textContent = text;
  }

  function mount(element, id, after = () => {}) {
    const holder = document.createElement('div');
    holder.className = 'live';
    element.replaceChildren(holder);
    places[id] = {element: holder, after, shown: undefined};
    put(id);
  }

  // Gradio's part. What has to be shown is asked for until it is: an answer may get lost.
  function settle() {
    if (!typed?.box.isConnected) typed = null;
    for (const id of ['repaint', 'refill']) {
      const button = document.getElementById(id), shown = nowShown(id), now = performance.now();
      if (!button || shown === wanted[id]) continue;        // buttons may come late
      if (id === 'refill' && (typed || !nowShown('repaint'))) continue;
      const again = asked[id]?.what === wanted[id];
      if (again && now - asked[id].at < (shown ? 3000 : 1000)) continue;
      if (again) version = '';              // what is wanted may have changed unsaid: told anew
      asked[id] = {what: wanted[id], at: now};
      button.click();
    }
  }

  function nowShown(id) {
    return document.querySelector(`#${id}-shown [data-shown]`)?.dataset.shown ?? '';
  }

  async function poll() {
    if (busy) { again = true; return; }
    busy = true;
    try {
      const answer = await plain(address, {method: 'POST', body: JSON.stringify({version, marks}),
                                           headers: {'content-type': 'application/json'}});
      if (!answer.ok) throw new Error(answer.status);
      lost(false);
      if (answer.status === 200) take(await answer.json());
      for (const id in told) id.startsWith('tab-') ? name(id, told[id]) : put(id);
      settle();
    } catch (error) { lost(true); }
    busy = false;
    if (again) { again = false; poll(); }
  }

  function take(news) {
    for (const [id, [mark, html]] of Object.entries(news.panels)) {
      told[id] = html;
      marks[id] = mark;
    }
    version = news.version;
    wanted.refill = String(news.filled);
    wanted.repaint = news.painted;
  }

  function lost(now) {
    misses = now ? misses + 1 : 0;
    document.documentElement.classList.toggle('lost', misses > 2);
  }

  function say(messages) {
    let place = document.getElementById('messages');
    if (!place) {
      place = document.createElement('div');
      place.id = 'messages';
      place.setAttribute('role', 'status');
      place.setAttribute('aria-live', 'polite');
      document.body.append(place);
    }
    for (const {kind, title, text, close} of messages) {
      const card = document.createElement('div'), shut = document.createElement('button');
      const head = document.createElement('b'), body = document.createElement('p');
      card.className = `message ${kind}`;
      head.textContent = title;
      body.textContent = text;
      shut.textContent = '×';
      shut.setAttribute('aria-label', close);
      shut.onclick = () => card.remove();
      card.append(shut, ...(title ? [head] : []), body);
      place.append(card);
      while (place.children.length > 4) place.firstChild.remove();
      setTimeout(() => card.remove(), kind === 'info' ? 6000 : 20000);
    }
  }

  // Diagnostics take seconds: the clipboard is promised the text while the click still counts.
  async function copy(button) {
    const {copy: from, copying, copied, copyFailed} = button.dataset;
    const before = button.textContent;
    button.disabled = true;
    button.textContent = copying;
    const text = plain(from).then(answer => answer.ok ? answer.text() : Promise.reject(answer));
    const close = '×';
    try {
      const item = text.then(found => new Blob([found], {type: 'text/plain'}));
      await navigator.clipboard.write([new ClipboardItem({'text/plain': item})]);
      const lines = (await text).trimEnd().split('\n').length;
      say([{kind: 'info', title: '', text: copied.replace('LINES', lines), close}]);
    } catch (error) {
      const found = await text.catch(() => ''), box = document.createElement('textarea');
      box.value = found;
      box.readOnly = true;
      box.rows = 12;
      box.setAttribute('aria-label', copyFailed);
      button.closest('.panel').querySelectorAll('textarea[readonly]').forEach(one => one.remove());
      button.closest('p').after(box);
      box.select();
      say([{kind: 'warning', title: '', text: copyFailed, close}]);
    }
    button.textContent = before;
    button.disabled = false;
  }
  document.addEventListener('click', event => {
    const button = event.target.closest('button[data-copy]');
    if (button && !button.disabled) copy(button);
  });

  document.addEventListener('input', ({target: box}) => {     // the slider of a comparison
    if (box.matches('.compare > input')) box.parentElement.style.setProperty('--at', `${box.value}%`);
  });

  // What is typed stays until it is saved: a refill waits, one that was on its way is undone.
  document.addEventListener('input', ({target: box}) => {
    if (box.matches('textarea, input:not([type=range], [type=checkbox], [type=radio])')
        && (box === document.activeElement || box === typed?.box) && !box.closest('.live'))
      typed = {box, value: box.value, selection: [box.selectionStart, box.selectionEnd]};
  });
  document.addEventListener('selectionchange', () => {
    const {box, value} = typed ?? {};
    if (box && box === document.activeElement && box.value === value)
      typed.selection = [box.selectionStart, box.selectionEnd];
  });
  document.addEventListener('keydown', ({key}) => { if (key === 'Enter') typed = null; });
  document.addEventListener('focusout', ({target: box}) => {
    if (typed?.box === box) setTimeout(saved, 1000, box);       // nothing to save: no handler ends
  });

  function saved(box) {
    if (typed?.box === box && box !== document.activeElement) typed = null;
  }

  function keep() {
    const {box, value, selection} = typed ?? {};
    if (!box || box.value === value || box !== document.activeElement) return;
    box.value = value;
    if (selection[0] !== null) box.setSelectionRange(...selection);     // numbers have none
    box.dispatchEvent(new Event('input', {bubbles: true}));
  }

  const plain = window.fetch.bind(window);
  window.fetch = async (what, ...more) => {     // a handler has ended: look at once
    const answer = await plain(what, ...more);
    if (String(what?.url ?? what).includes('/gradio_api/run')) {
      setTimeout(poll, 0);
      for (const wait of [0, 50, 250]) setTimeout(keep, wait);
      setTimeout(saved, 250, typed?.box);
    }
    return answer;
  };
  setInterval(() => { if (document.visibilityState === 'visible') poll(); }, 1000);
  document.addEventListener('visibilitychange', () => {
    if (document.visibilityState === 'visible') poll();
  });
  poll();
  return {mount, poll, say};
})();
