// The ranked-list browser, in a page that holds its lists (`fromPage`) and in a notebook, where it asks
// Python for them (`fromKernel`). `start` puts it together of a picker (browser_picker.js), lists
// (browser_lists.js), a larger view and tags (browser_larger.js); Python joins the files. Data become
// text nodes and attributes, never markup.

const STATUS = {
  m: { status: "match", kind: "right", sign: "✓", word: "right" },
  w: { status: "wrong", kind: "wrong", sign: "✗", word: "wrong" },
  u: { status: "unknown", kind: "plain", sign: "", word: "" },
  c: { status: "same camera", kind: "excluded", sign: "–", word: "same camera" },
  j: { status: "junk", kind: "excluded", sign: "–", word: "junk" },
  i: { status: "query itself", kind: "excluded", sign: "–", word: "query itself" },
};
const COLUMNS = "run asked query rank gallery pid camid distance status query_path path".split(" ");
const TAGS = "path action pid tag note".split(" "); // a file for `reidlib.data.corrections`
const PAGE = 60; // queries that the picker draws at a time
const ARROWS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
const KEYS = [
  ["arrows, Home, End", "move in the list that has the focus"],
  ["Enter, Tab", "the result in focus becomes the query; go to its tick and its larger view"],
  ["N, P", "next and previous query, in the chosen order"],
  ["Z", "larger view, of the result in focus; there arrows go on, and Esc closes"],
  ["Backspace", "back to the query that was in view before"],
];

// --- where lists and photographs come from

function fromPage(data, photos, why) {
  const kept = `reidlib tags ${data.about.id}`;
  return {
    about: data.about,
    why,
    most: (key) => (sideOf(key) === "query" ? data.about.most : data.about.topk),
    tags: () => JSON.parse(localStorage.getItem(kept) ?? "{}"),
    keep: (tags) => localStorage.setItem(kept, JSON.stringify(tags)),
    has: (key) => key in data.lists,
    lists: async (key) => data.lists[key],
    image: (key) => data.images[key],
    photo: async (key) => url(photos[key]),
  };
}

function fromKernel(model, about, late) {
  const waiting = new Map(); // id of a question -> who waits for its answer
  const images = {};
  const photos = new Map(); // key -> promise of a URL
  const wanted = []; // keys and who waits for their photographs

  const listen = ({ id, error, answer }) => {
    const question = waiting.get(id);
    if (!waiting.delete(id)) return;
    clearTimeout(question.timer);
    late(false);
    if (error) question.reject(new Error(error));
    else question.resolve(answer);
  };
  model.on("msg:custom", listen);

  const ask = (what, keys, topk = null) =>
    new Promise((resolve, reject) => {
      const id = Math.random().toString(36).slice(2); // several views of one widget share its messages
      waiting.set(id, { resolve, reject, timer: setTimeout(() => late(true), 5000) });
      model.send({ id, ask: what, keys, topk });
    });

  const fetchPhotos = () => {
    while (wanted.length) {
      const part = wanted.splice(0, PAGE);
      const found = ask("photos", part.map(([key]) => key)).catch(() => ({}));
      found.then((photos) => part.forEach(([key, resolve]) => resolve(url(photos[key]))));
    }
  };

  return {
    about,
    why: about.why,
    most: () => about.most,
    tags: () => ({ ...model.get("tagged") }),
    keep: (tags) => (model.set("tagged", { ...tags }), model.save_changes()),
    has: (key) => sideOf(key) === "query" || about.follows,
    lists: async (key, topk) => {
      const answer = await ask("lists", [key], topk);
      Object.assign(images, answer.images);
      return answer.lists[key];
    },
    image: (key) => images[key],
    photo: (key) => {
      if (!photos.has(key)) {
        photos.set(key, new Promise((resolve) => wanted.push([key, resolve])));
        if (wanted.length === 1) setTimeout(fetchPhotos);
      }
      return photos.get(key);
    },
    close: () => model.off("msg:custom", listen),
  };
}

// --- small helpers

const url = (photo) => (photo ? `data:image/webp;base64,${photo}` : null);

const percent = (value, digits = 1) => (value === null ? "none" : `${(100 * value).toFixed(digits)} %`);
const points = (value) => {
  const size = Math.abs(100 * value).toFixed(1);
  return `${size === "0.0" ? "±" : value > 0 ? "+" : "−"}${size}`;
};
const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const who = (pid) => (pid > 0 ? `identity ${pid}` : pid === 0 ? "distractor" : "identity unknown");
const where = (camid) => (camid >= 0 ? `camera ${camid}` : "camera unknown");
const short = (pid) => (pid > 0 ? `id ${pid}` : pid === 0 ? "distractor" : "");
const shortCamera = (camid) => (camid >= 0 ? `c${camid}` : "");
const last = (name) => name.split("/").pop();
const joined = (...parts) => parts.filter(Boolean).join(", ");
// A key names an image: "q12" is row 12 of the query table, "g7" row 7 of the gallery table.
const sideOf = (key) => (key[0] === "q" ? "query" : "gallery");
const rowOf = (key) => Number(key.slice(1));

const labelled = (text, control) => make("label", {}, make("span", {}, text), control);
const cameras = (list) => [["", "all"], ...list.map((c) => [String(c), where(c)])];
const menu = (name, pairs) =>
  make("select", { name }, ...pairs.map(([value, text]) => make("option", { value }, text)));

// A number that looks drawn, and is the same for the same seed: MurmurHash3's last steps.
function luck(i, seed) {
  let hash = Math.imul(i + 1, 0x9e3779b1) + seed;
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return (hash ^ (hash >>> 16)) >>> 0;
}

// Filters that fold on a narrow screen; on a wide one they stand open, without a line to fold them.
function folding(title, ...controls) {
  const fold = make("details", { className: "fold", open: true }, make("summary", {}, title), make("div", {}, ...controls));
  let wide = true;
  new ResizeObserver(() => {
    const now = fold.closest(".ranked-lists")?.clientWidth > 620;
    if (now !== wide) fold.open = wide = now;
  }).observe(fold);
  return fold;
}

// One tab stop for a whole list; arrow keys, Home and End move inside it.
function roving(list, items, more = () => {}) {
  list.addEventListener("keydown", (event) => {
    const step = { ...ARROWS, Home: -1e9, End: 1e9 };
    if (!(event.key in step) || !items().includes(event.target)) return;
    event.preventDefault();
    const at = items().indexOf(event.target) + step[event.key];
    if (at >= items().length) more();
    const next = items()[Math.max(0, Math.min(items().length - 1, at))];
    for (const item of items()) item.tabIndex = item === next ? 0 : -1;
    next.focus();
  });
}

// --- the browser

// Show the lists of a source inside a node. A page of its own has `level` 1, the level of its first
// heading, and `page` true; `change` is told of what is ticked and of what is in view.
function start(root, source, options) {
  const app = shared(source, options);
  app.tags = makeTags(app, root);
  app.selection = makeSelection(app);
  app.larger = makeLarger(app);
  app.picker = makePicker(app);
  app.answer = makeAnswer(app);
  for (const [kind, colour] of Object.entries(app.about.colours)) root.style.setProperty(`--${kind}`, colour);
  const columns = make("div", { className: "columns" }, app.picker.node, app.answer.node);
  root.replaceChildren(header(app), columns, app.larger.node, app.said);
  (app.page ? document : root).addEventListener("keydown", (event) => press(app, event));
  app.picker.pick();
  const linked = () => {
    const key = app.page ? location.hash.slice(1) : "";
    return /^[qg]\d+$/.test(key) && source.has(key) ? key : null;
  };
  const first = linked() ?? app.picker.first();
  if (first) app.answer.go(first, { keep: false, reveal: true });
  if (!app.page) return;
  window.addEventListener("popstate", () => {
    const key = linked();
    if (key && key !== app.key) app.answer.go(key, { keep: false, focus: true, reveal: true });
  });
}

function press(app, event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input:not([type=checkbox]), select, dialog")) return;
  const letters = { n: () => app.picker.step(1), p: () => app.picker.step(-1), z: () => app.shown && app.larger.open(event.target) };
  const does = { backspace: app.answer.goBack, ...(app.letters.checked && letters) }[event.key.toLowerCase()];
  if (does) event.preventDefault();
  does?.();
}

// What the parts of the browser share: the data, what is chosen, and helpers that need the data.
function shared(source, { level, page, change = () => {} }) {
  const { about } = source;
  const { runs, queries } = about;
  const rowAt = new Map(queries.row.map((row, i) => [`q${row}`, i]));
  return {
    ...{ source, about, runs, queries, page, change },
    topk: about.topk, // ranked images to show; "show more" makes it larger
    letters: make("input", { type: "checkbox", name: "letters", checked: true }), // are they keys?
    two: runs.length === 2,
    scored: runs.every((run) => run.scored),
    key: null, // of the query that was chosen last
    shown: null, // {key, records} of the query whose lists are in view
    camera: "", // of the results to show; "" for all
    excluded: true, // show them?
    said: make("p", { className: "hidden-text", role: "status" }), // for screen readers
    heading: (below, properties, ...text) => make(`h${level + below}`, properties, ...text),
    image(key) {
      const i = rowAt.get(key);
      return i === undefined ? source.image(key) : [queries.name[i], queries.pid[i], queries.camid[i]];
    },
    photo(key, alt) {
      const image = make("img", { alt, decoding: "async", loading: "lazy", className: "waiting" });
      source.photo(key).then((found) => {
        image.classList.remove("waiting");
        if (found) image.src = found;
        else image.replaceWith(make("span", { className: "none", role: "img", "aria-label": alt }, "no picture"));
      });
      return image;
    },
  };
}

function header(app) {
  const { about, runs, two, scored, heading } = app;
  const scores = runs.map((run) => make("p", {}, two ? make("b", {}, `${run.name}: `) : "", run.scores));
  const entry = (kind, text) => make("span", { className: kind }, make("i"), text);
  const key = make("p", { className: "key" }, entry("right", "✓ right: same person"), entry("wrong", "✗ wrong: somebody else"),
    entry("excluded", "– excluded: left out of the ranking, with the reason"));
  const notes = about.notes.map((note) => make("p", {}, note));
  const details = make("details", {}, make("summary", {}, "what is shown, and how"), ...notes);
  const lines = KEYS.flatMap(([keys, does]) => [make("dt", {}, keys), make("dd", {}, does)]);
  const letters = make("label", { className: "check" }, app.letters, "single letters are keys");
  const keys = make("details", {}, make("summary", {}, "keys"), make("dl", {}, ...lines), letters);
  return make("header", {}, heading(0, {}, about.title), ...scores, scored ? key : "", details, keys);
}

// --- in a notebook

function render({ model, el }) {
  el.classList.add("ranked-lists");
  el.dataset.lmSuppressShortcuts = "true"; // else JupyterLab takes the keys for itself
  const dark = () => {
    const light = document.body.dataset.jpThemeLight;
    if (light !== undefined) el.dataset.theme = light === "false" ? "dark" : "light";
  };
  dark();
  const theme = new MutationObserver(dark);
  theme.observe(document.body, { attributeFilter: ["data-jp-theme-light"] });
  const box = make("div");
  const late = "Python has not answered yet: the kernel is busy, or was stopped. If stopped, run this cell again.";
  const trouble = make("p", { role: "alert", hidden: true }, late);
  el.append(trouble, box);
  const source = fromKernel(model, model.get("about"), (isLate) => (trouble.hidden = !isLate));
  const change = (ticked, view) => {
    model.set("ticked", ticked);
    model.set("view", view);
    model.save_changes();
  };
  start(box, source, { level: 3, page: false, change });
  return () => {
    theme.disconnect();
    source.close();
  };
}

// --- in a page of its own

const inPage = document.getElementById("ranked-lists");
if (inPage) {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const [data, photos, why] = ["data", "photos", "why"].map((part) => read(`ranked-lists-${part}`));
  start(inPage, fromPage(data, photos, why), { level: 1, page: true });
}

export default { render };
