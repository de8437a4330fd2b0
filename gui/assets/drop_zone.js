// Files and folders that are dropped or chosen: uploaded a few at a time, then told together.
const zone = element.querySelector('.drop'), said = element.querySelector('.said');
const fits = file => new RegExp(zone.dataset.suffixes, 'i').test(file.name)
  && !file.name.startsWith('.');

async function inside(entry) {
  if (entry.isFile) return [await new Promise((done, fail) => entry.file(done, fail))];
  const reader = entry.createReader(), found = [];
  for (;;) {                                // it tells 100 at a time
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) break;
    for (const one of some) if (!one.name.startsWith('.')) found.push(...await inside(one));
  }
  return found;
}

async function take(files) {
  document.activeElement?.blur();               // what comes may fill the box there
  const wanted = files.filter(fits), paths = [];
  if (!wanted.length) { said.textContent = zone.dataset.none; return; }
  let next = 0;
  const tell = () => {
    said.textContent = zone.dataset.doing.replace('DONE', paths.length)
      .replace('TOTAL', wanted.length);
  };
  const worker = async () => {
    while (next < wanted.length) {
      const {path} = await upload(wanted[next++]);
      paths.push(path);
      tell();
    }
  };
  tell();
  try {
    await Promise.all([worker(), worker(), worker(), worker()]);
    said.textContent = '';
  } catch (error) { said.textContent = zone.dataset.failed; }
  if (paths.length) trigger('click', {act: 'dropped', id: JSON.stringify(paths)});
}

element.addEventListener('dragover', event => {
  event.preventDefault();
  zone.classList.add('over');
});
element.addEventListener('dragleave', () => zone.classList.remove('over'));
element.addEventListener('drop', async event => {
  event.preventDefault();
  zone.classList.remove('over');
  const entries = [...event.dataTransfer.items].map(item => item.webkitGetAsEntry())
    .filter(Boolean);
  take((await Promise.all(entries.map(inside))).flat());
});
element.addEventListener('change', event => {
  take([...event.target.files]);
  event.target.value = '';
});
element.addEventListener('click', event => {
  const button = event.target.closest('[data-choose]');
  if (button) element.querySelector(`input[name=${button.dataset.choose}]`).click();
});
