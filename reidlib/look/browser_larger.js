// The larger view, and what is noted of images: tags, and corrections of labels. A part of browser.js.

// Query, a result and the nearest match, side by side, as large as the window lets them be.
function makeLarger(app) {
  const [before, next] = [["‹ result before", -1], ["next result ›", 1]].map(([text, by]) => button(text, () => draw(by)));
  const close = button("close", () => node.close());
  const overlay = make("input", { type: "checkbox", name: "overlay", checked: true });
  const check = make("label", { className: "check" }, overlay, "what makes two alike (orange) or tells them apart (blue)");
  const pictures = make("div", { className: "pictures" });
  const tags = make("div");
  const title = app.heading(1, {});
  const bar = make("div", { className: "controls" }, before, next, check, close);
  const node = make("dialog", { className: "larger", "aria-label": "larger view" }, title, bar, pictures, tags);
  let [r, at, results, opener] = [0, 0, [], null];

  // Open it for the result that a node of the list belongs to, else for the first one.
  function open(from) {
    const item = from.closest(".results li");
    r = item ? [...app.answer.node.querySelectorAll(".run")].indexOf(item.closest(".run")) : 0;
    results = inList(app, app.shown.records[r]);
    at = item ? results.findIndex(({ row }) => String(row) === item.dataset.row) : 0;
    if (!results.length) return;
    opener = from;
    draw();
    node.showModal();
  }

  function draw(by = 0) {
    at = Math.max(0, Math.min(results.length - 1, at + by));
    const { key } = app.shown;
    const result = results[at];
    const match = resultsOf(app.shown.records[r]).find(({ code }) => code === "m");
    const maps = app.source.why.maps ?? {};
    const [own, other] = [result, match].map((one) => one && maps[`${key} g${one.row}`]);
    const drawn = overlay.checked ? [(own ?? other)?.[0], own?.[1], other?.[1]] : [];
    const figures = [pictured(app, key, null, "query", drawn[0]), pictured(app, `g${result.row}`, result, "result", drawn[1])];
    if (match && match !== result) figures.push(pictured(app, `g${match.row}`, match, "nearest match", drawn[2]));
    [check.hidden, before.disabled, next.disabled] = [!(own || other), at === 0, at === results.length - 1];
    title.textContent = `Larger view: result ${at + 1} of ${results.length}`;
    pictures.replaceChildren(...figures);
    tags.replaceChildren(app.tags.form(`g${result.row}`, "tag the result"));
  }

  overlay.addEventListener("change", () => draw());
  node.addEventListener("close", () => opener.isConnected && opener.focus());
  node.addEventListener("keydown", (event) => {
    if (event.target.matches("input:not([type=checkbox]), select") || !(event.key in ARROWS)) return;
    event.preventDefault();
    draw(ARROWS[event.key]);
  });
  return { node, open };
}

function pictured(app, key, result, title, drawn) {
  const [name, pid, camid] = app.image(key);
  const { kind, sign, word } = result ? STATUS[result.code] : { kind: "plain", sign: "", word: "" };
  const of = joined(title, result?.rank ? `rank ${result.rank}` : "", word, who(pid), where(camid));
  const image = drawn ? make("img", { alt: `${of}; where it is alike`, src: url(drawn) }) : app.photo(key, of);
  const lines = [who(pid), where(camid), result ? `distance ${result.distance.toPrecision(4)}` : "", name];
  const head = make("b", {}, `${sign} ${joined(title, result?.rank ? `rank ${result.rank}` : word)}`.trim());
  const caption = make("figcaption", {}, head, ...lines.filter(Boolean).map((line) => make("span", {}, line)), app.tags.mark(key));
  return make("figure", { className: kind }, make("div", { className: "photo" }, image), caption);
}

// What is noted of images, by key: kept by the source, and saved as a table that corrects the data.
function makeTags(app, root) {
  let kept = true; // does the source keep it?
  const attempt = (act) => {
    try {
      return act();
    } catch {
      kept = false; // a browser may forbid a page from disk to store anything
      return null;
    }
  };
  const tags = attempt(app.source.tags) ?? {};
  const save = button("", () => saveCsv("corrections.csv", TAGS, Object.values(tags).map(numbered)), { className: "save-tags" });
  const { several } = app.about; // data sets, whose people have other numbers here than by themselves
  const numbered = (entry) => (several && entry.pid ? { ...entry, pid: `${entry.pid} of ${several}` } : entry);
  const words = ({ action, pid, tag, note }) => joined(action === "relabel" ? `relabel ${pid}` : action, tag, note);
  const text = (key) => (tags[key] ? `⚑ ${words(tags[key])}` : "");
  const mark = (key) => make("span", { className: "mark", "data-tag": key }, text(key));

  function tell(key) {
    for (const node of root.querySelectorAll(`[data-tag="${key}"]`)) node.textContent = text(key);
    const n = Object.keys(tags).length;
    save.hidden = n === 0;
    save.textContent = `save ${count(n, "tag")} as CSV${kept ? "" : ": not kept here"}`;
  }

  function set(key, name, value) {
    const entry = { ...tags[key], [name]: value, path: app.about.folders[key[0]] + app.image(key)[0] };
    tags[key] = entry;
    if (!entry.tag && !entry.note && !entry.action) delete tags[key];
    attempt(() => app.source.keep(tags));
    tell(key);
  }

  function form(key, title = "tag the query") {
    const field = (name, said, control) => {
      control.value = tags[key]?.[name] ?? "";
      control.addEventListener("change", () => set(key, name, control.value.trim()));
      return labelled(said, control);
    };
    const actions = [["", "keep"], ["drop", "drop it"], ["relabel", "relabel as"]];
    return make("fieldset", { className: "tags" }, make("legend", {}, title),
      field("tag", "tag", make("input", { name: "tag", autocomplete: "off" })),
      field("note", "note", make("input", { name: "note", autocomplete: "off" })),
      field("action", "label", menu("action", actions)),
      field("pid", "new identity", make("input", { type: "number", name: "pid", min: -1 })));
  }

  tell("");
  return { mark, form, save, has: (key) => key in tags };
}
