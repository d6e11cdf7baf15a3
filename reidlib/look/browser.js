// The ranked-list browser. It runs in a page that holds its lists (`fromPage`) and in a notebook, where
// it asks Python for them (`fromKernel`); all else is the same. File names and all other data reach the
// document as text nodes and attributes only, never as markup.

const STATUS = {
  m: { status: "match", kind: "right", sign: "✓", word: "right" },
  w: { status: "wrong", kind: "wrong", sign: "✗", word: "wrong" },
  u: { status: "unknown", kind: "plain", sign: "", word: "" },
  c: { status: "same camera", kind: "excluded", sign: "–", word: "same camera" },
  j: { status: "junk", kind: "excluded", sign: "–", word: "junk" },
  i: { status: "query itself", kind: "excluded", sign: "–", word: "query itself" },
};
const COLUMNS = [
  ...["run", "asked", "query", "query_path", "rank", "gallery", "path", "pid", "camid", "distance"],
  "status",
];
const PAGE = 60; // queries that the picker draws at a time

// --- where lists and photographs come from

function fromPage(data, photos) {
  return {
    about: data.about,
    has: (key) => key in data.lists,
    lists: async (key) => data.lists[key],
    image: (key) => data.images[key],
    photo: async (key) => url(photos[key]),
  };
}

function fromKernel(model, about, late) {
  const waiting = new Map();
  const images = {};
  const photos = new Map(); // key -> promise of a URL
  let wanted = [];
  let asked = 0;
  const view = Math.random().toString(36).slice(2); // several views of one widget share its messages

  const listen = (message) => {
    const question = waiting.get(message.id);
    if (!question) return;
    waiting.delete(message.id);
    clearTimeout(question.timer);
    late(false);
    if (message.error) question.reject(new Error(message.error));
    else question.resolve(message.answer);
  };
  model.on("msg:custom", listen);

  const ask = (what, keys) =>
    new Promise((resolve, reject) => {
      const id = `${view}-${(asked += 1)}`;
      waiting.set(id, { resolve, reject, timer: setTimeout(() => late(true), 5000) });
      model.send({ id, ask: what, keys });
    });

  const fetchPhotos = () => {
    const batch = wanted;
    wanted = [];
    for (let i = 0; i < batch.length; i += PAGE) {
      const part = batch.slice(i, i + PAGE);
      ask("photos", part.map(([key]) => key)).then(
        (found) => part.forEach(([key, resolve]) => resolve(url(found[key]))),
        () => part.forEach(([, resolve]) => resolve(null)),
      );
    }
  };

  return {
    about,
    has: (key) => key[0] === "q" || about.follows,
    lists: async (key) => {
      const answer = await ask("lists", [key]);
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

function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name in node && !name.startsWith("aria")) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

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

function shuffled(rows, seed) {
  // Fisher and Yates, with a generator of its own (mulberry32): the same order for the same seed.
  const order = [...rows];
  for (let i = order.length - 1; i > 0; i--) {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    const j = ((t ^ (t >>> 14)) >>> 0) % (i + 1);
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

function csv(rows) {
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [COLUMNS, ...rows.map((row) => COLUMNS.map((name) => row[name]))]
    .map((row) => row.map(cell).join(",") + "\n")
    .join("");
}

// One tab stop for a whole list; arrow keys, Home and End move inside it.
function roving(list, items, more = () => {}) {
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -1e9, End: 1e9 };
    if (!(event.key in step) || event.target.tagName !== "BUTTON") return;
    event.preventDefault();
    const at = items().indexOf(event.target) + step[event.key];
    if (at >= items().length) more();
    const next = items()[Math.max(0, Math.min(items().length - 1, at))];
    for (const item of items()) item.tabIndex = item === next ? 0 : -1;
    next.focus();
  });
}

// --- the browser

function start(root, source, { level, page, change = () => {} }) {
  const { about } = source;
  const { runs, queries, topk } = about;
  const two = runs.length === 2;
  const scored = runs.every((run) => run.scored);
  const state = { key: null, back: [], camera: "", excluded: true, seed: 0 };
  const ticked = new Map(); // id -> row of the table to take away
  const heading = (below, properties, ...text) => make(`h${level + below}`, properties, ...text);
  const rowAt = new Map(queries.row.map((row, i) => [`q${row}`, i]));
  const imageOf = (key) => {
    const i = rowAt.get(key);
    if (i === undefined) return source.image(key);
    return [queries.name[i], queries.pid[i], queries.camid[i]];
  };

  const photo = (key, alt) => {
    const image = make("img", { alt, decoding: "async" });
    image.className = "waiting";
    source.photo(key).then((found) => {
      image.classList.remove("waiting");
      if (found) image.src = found;
      else image.replaceWith(make("span", { className: "none", role: "img", "aria-label": alt }, "no picture"));
    });
    return image;
  };

  const labelled = (text, control) => make("label", {}, make("span", {}, text), control);
  const options = (select, pairs) => {
    for (const [value, text] of pairs) select.append(make("option", { value }, text));
    return select;
  };
  const cameras = (list) => [["", "all"], ...list.map((c) => [String(c), where(c)])];

  // --- picking a query

  const orders = [];
  runs.forEach((run, r) => {
    if (!scored) return;
    const ap = two ? `AP of ${run.name}` : "AP";
    orders.push([`worst${r}`, `${ap}, worst first`], [`best${r}`, `${ap}, best first`]);
  });
  if (two && scored) {
    const change = `AP from ${runs[0].name} to ${runs[1].name}`;
    orders.push(["gain", `largest gain of ${change}`], ["loss", `largest loss of ${change}`]);
  }
  orders.push(["random", "random order"], ["table", "order of the query table"]);

  const sort = options(make("select", { name: "order" }), orders);
  const search = make("input", { type: "search", name: "search", autocomplete: "off" });
  const queryCamera = options(make("select", { name: "query-camera" }), cameras(about.cameras.query));
  const found = make("p", { className: "note" });
  const strip = make("ol", { className: "strip", "aria-label": "queries, in the chosen order" });
  const stripButtons = () => [...strip.querySelectorAll("button")];
  let order = [];

  const value = (i) => {
    const ap = queries.ap.map((run) => run[i]);
    const kind = sort.value.replace(/\d/, "");
    if (kind === "gain" || kind === "loss") {
      if (ap[0] === null || ap[1] === null) return null;
      return kind === "gain" ? ap[0] - ap[1] : ap[1] - ap[0];
    }
    const own = ap[Number(sort.value.slice(-1))];
    return own === null ? null : kind === "worst" ? own : -own;
  };

  function pick() {
    const text = search.value.trim().toLowerCase();
    const person = /^\d+$/.test(text) && queries.pid.includes(Number(text)) ? Number(text) : null;
    order = queries.row.map((_, i) => i).filter((i) => {
      if (queryCamera.value && String(queries.camid[i]) !== queryCamera.value) return false;
      // A number is an identity, where there is such a one; all else is part of a file name.
      return person === null ? queries.name[i].toLowerCase().includes(text) : queries.pid[i] === person;
    });
    if (sort.value === "random") order = shuffled(order, state.seed);
    else if (sort.value !== "table") {
      const values = new Map(order.map((i) => [i, value(i)]));
      // Queries without a match have no AP: they stand last in both directions.
      order.sort((a, b) => {
        const [x, y] = [values.get(a), values.get(b)];
        if (x === null || y === null) return (x === null) - (y === null) || a - b;
        return x - y || a - b;
      });
    }
    const all = about.total.toLocaleString("en");
    const some = queries.row.length < about.total;
    const inFile = some ? ` in this file; the test has ${all}` : "";
    const missing = some ? ` Or it is not in this file, which has ${queries.row.length.toLocaleString("en")} of ${all}.` : "";
    // A menu cuts long names off, and with them the direction.
    const direction = two && scored ? `${sort.selectedOptions[0].textContent}: ` : "";
    found.textContent =
      order.length === 0
        ? "No query fits. Clear the search, or choose another camera." + missing
        : `${direction}${order.length.toLocaleString("en")} of ${count(queries.row.length, "query", "queries")}${inFile}`;
    strip.replaceChildren();
    strip.scrollTop = strip.scrollLeft = 0;
    more();
  }

  function more() {
    const from = strip.children.length;
    for (const i of order.slice(from, from + PAGE)) {
      const key = `q${queries.row[i]}`;
      const ap = queries.ap.map((run) => run[i]);
      const name = last(queries.name[i]); // of somebody unknown, all that there is
      const lines = [joined(short(queries.pid[i]) || name || who(queries.pid[i]), shortCamera(queries.camid[i]))];
      if (scored) {
        if (two && ap[0] !== null && ap[1] !== null) {
          lines.push(`${percent(ap[0])} → ${percent(ap[1])}`, `${points(ap[1] - ap[0])} points`);
        } else lines.push(ap[0] === null ? "no match" : `AP ${percent(ap[0])}`);
      }
      const button = make(
        "button",
        { type: "button", tabIndex: strip.children.length ? -1 : 0, title: queries.name[i] },
        photo(key, `query, ${joined(who(queries.pid[i]), where(queries.camid[i]))}`),
        make("span", { className: "words" }, ...lines.flatMap((line, n) => (n ? [make("br"), line] : [line]))),
      );
      button.dataset.key = key;
      button.addEventListener("click", () => go(key));
      strip.append(make("li", {}, button));
    }
    markCurrent();
  }

  function markCurrent() {
    for (const button of stripButtons()) {
      if (button.dataset.key === state.key) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
  }

  roving(strip, stripButtons, more);
  strip.addEventListener("scroll", () => {
    const below = strip.scrollHeight - strip.scrollTop - strip.clientHeight;
    const beside = strip.scrollWidth - strip.scrollLeft - strip.clientWidth;
    if (below + beside < 400 && strip.children.length < order.length) more();
  });
  sort.addEventListener("change", () => {
    if (sort.value === "random") state.seed += 1;
    pick();
  });
  search.addEventListener("input", pick);
  queryCamera.addEventListener("change", pick);

  // --- one query and its lists

  const answer = make(page ? "main" : "section", { className: "answer", "aria-label": "ranked lists" });
  const said = make("p", { className: "hidden-text", role: "status" });
  const back = make("button", { type: "button", className: "back" }, "← query before");
  const resultCamera = options(make("select", { name: "result-camera" }), cameras(about.cameras.gallery));
  const excluded = make("input", { type: "checkbox", name: "excluded", checked: true });
  const asked = make("div", { className: "asked" });
  const lists = make("div", { className: two ? "lists two" : "lists" });
  const selected = make("span", { className: "selected", "aria-live": "polite" });
  const save = make("button", { type: "button" });
  const clear = make("button", { type: "button" }, "clear");
  let shown = null; // {key, records}

  async function go(key, { keep = true, focus = false } = {}) {
    if (keep && state.key && state.key !== key) state.back.push(state.key);
    state.key = key;
    answer.setAttribute("aria-busy", "true");
    markCurrent();
    let records;
    try {
      records = await source.lists(key);
    } catch (error) {
      if (state.key !== key) return;
      answer.removeAttribute("aria-busy");
      asked.replaceChildren(make("p", { role: "alert" }, `Python could not answer: ${error.message}`));
      lists.replaceChildren();
      return;
    }
    if (state.key !== key) return; // another query was chosen meanwhile
    answer.removeAttribute("aria-busy");
    shown = { key, records };
    draw();
    if (page) history.replaceState(null, "", `#${key}`);
    if (focus) asked.querySelector("h2,h3,h4,h5")?.focus();
  }

  function goBack() {
    if (state.back.length) go(state.back.pop(), { keep: false, focus: true });
  }
  back.addEventListener("click", goBack);
  root.addEventListener("keydown", (event) => {
    if (event.key === "Backspace" && event.target !== search) {
      event.preventDefault();
      goBack();
    }
  });

  const resultsOf = (record) =>
    (record?.rows ?? []).map((row, i) => {
      return { row, rank: record.ranks[i], distance: record.distances[i], code: record.status[i] };
    });
  const matchRanks = (record) =>
    new Map(resultsOf(record).flatMap(({ row, rank, code }) => (code === "m" ? [[row, rank]] : [])));

  function statement(record, name) {
    if (record === null) {
      return `${name || "This run"} knows the distances of its own queries only: this image cannot ask here.`;
    }
    const ranks = [...matchRanks(record).values()];
    if (record.status.includes("u")) {
      return "Nothing is right or wrong here, for it is not known who is asked for.";
    }
    if (ranks.length === 0) return "No match: the gallery holds no other image of this person that counts.";
    const first = ranks.filter((rank) => rank <= topk).length;
    return (
      `AP ${percent(record.ap, 2)} (Market's definition: ${percent(record.ap_market, 2)}). ` +
      `${count(ranks.length, "match", "matches")}, first at rank ${Math.min(...ranks).toLocaleString("en")}` +
      (ranks.length > 1 ? `, last at rank ${Math.max(...ranks).toLocaleString("en")}` : "") +
      `; ${first} of them among the first ${topk}.`
    );
  }

  function draw() {
    const { key, records } = shown;
    const [name, pid, camid] = imageOf(key);
    const unnamed = pid < 0 && camid < 0 && name; // else nothing is known but the file
    const title = `Query: ${unnamed ? last(name) : joined(who(pid), where(camid))}`;
    const facts = [name || `row ${key.slice(1)} of the ${key[0] === "q" ? "query" : "gallery"} table`];
    if (key[0] === "g") facts.push("a gallery image, asked as a query");
    const ranks = records.map(matchRanks);
    if (two && records[0]?.ap != null && records[1]?.ap != null) {
      const moves = [...ranks[0]].map(([row, rank]) => rank - ranks[1].get(row));
      facts.push(
        `AP ${percent(records[0].ap)} in ${runs[0].name}, ${percent(records[1].ap)} in ${runs[1].name}: ` +
          `${points(records[1].ap - records[0].ap)} points. Of ${count(moves.length, "match", "matches")}, ` +
          `${moves.filter((m) => m > 0).length} moved up, ${moves.filter((m) => m < 0).length} down.`,
      );
    }
    asked.replaceChildren(
      photo(key, `query, ${joined(who(pid), where(camid))}`),
      make(
        "div",
        {},
        heading(1, { tabIndex: -1 }, title),
        ...facts.map((fact, i) => make("p", { className: i ? "" : "file" }, fact)),
      ),
    );
    back.disabled = state.back.length === 0;
    lists.replaceChildren(...records.map((record, r) => drawRun(record, r, ranks)));
    const texts = records.map((record, r) => {
      const text = statement(record, runs[r].name);
      return two ? `${runs[r].name}: ${text}` : text;
    });
    said.textContent = `${title}. ${texts.join(" ")}`;
    tell();
  }

  function drawRun(record, r, ranks) {
    const { key } = shown;
    const box = make("section", { className: "run", "aria-label": `list of ${runs[r].name || "this run"}` });
    if (two) box.append(heading(2, {}, runs[r].name));
    box.append(make("p", { className: "statement" }, statement(record, runs[r].name)));
    if (record === null) return box;
    const all = resultsOf(record);
    const dropped = all.filter((result) => result.rank === 0);
    const fits = (result) =>
      (!state.camera || String(source.image(`g${result.row}`)[2]) === state.camera) &&
      (state.excluded || result.rank > 0);
    const near = all.filter((result) => result.rank <= topk);
    const missed = all.filter((result) => result.rank > topk);
    const notes = [];
    if (dropped.length && !state.excluded) {
      notes.push(`Hidden: ${count(dropped.length, "image")} that the protocol leaves out.`);
    }
    if (state.camera) {
      notes.push(
        `Only ${where(Number(state.camera))} is shown: ${near.filter(fits).length} of ${near.length}. ` +
          "Ranks and AP are those of the whole list.",
      );
    }
    if (notes.length) box.append(make("p", { className: "note" }, notes.join(" ")));
    const section = (results, label) => {
      const list = make("ol", { className: "results", "aria-label": label });
      list.append(...results.filter(fits).map((result, i) => drawResult(key, r, result, i, ranks)));
      roving(list, () => [...list.querySelectorAll("button")]);
      return list;
    };
    box.append(section(near, `the first ${topk}, nearest first`));
    if (missed.length) {
      const places = missed.map((result) => result.rank.toLocaleString("en"));
      box.append(
        heading(two ? 3 : 2, {}, `Missed: ${count(missed.length, "match", "matches")} beyond rank ${topk}`),
        make("p", { className: "note" }, `at rank ${places.join(", ")}`),
        section(missed, "missed matches"),
      );
    }
    return box;
  }

  function drawResult(key, r, result, i, ranks) {
    const { kind, sign, word, status } = STATUS[result.code];
    const its = `g${result.row}`;
    const [name, pid, camid] = source.image(its);
    const rank = result.rank ? `rank ${result.rank}` : "not ranked";
    const distance = result.distance.toPrecision(4); // all the digits that are there
    const move = { shown: "", said: "" };
    if (two && result.code === "m" && ranks[1 - r].has(result.row)) {
      const there = ranks[1 - r].get(result.row);
      const up = r ? there - result.rank : result.rank - there; // from the first run to the second
      const places = count(Math.abs(up), "place");
      const other = `rank ${there} in ${runs[1 - r].name}`;
      const [sign, word] = up > 0 ? ["▲", "up"] : ["▼", "down"];
      const side = r ? "from" : "to";
      move.shown = up === 0 ? "= same rank" : `${sign} ${Math.abs(up)}, ${side} ${there}`;
      move.said = up === 0 ? `same ${other}` : `moved ${word} ${places}, ${side} ${other}`;
    }
    const can = source.has(its);
    const place = pid < 0 && camid < 0 && name ? last(name) : where(camid);
    const alt = joined(rank, word, pid >= 0 ? who(pid) : "", place, move.said);
    const button = make(
      "button",
      {
        type: "button",
        className: "photo",
        tabIndex: i ? -1 : 0,
        title: can ? "make this image the query" : "there is no list of its own here",
        "aria-disabled": can ? null : "true",
      },
      photo(its, alt),
    );
    button.addEventListener("click", () => {
      if (can) go(its, { focus: true });
      else said.textContent = "There is no list of this image here.";
    });
    const id = `${r} ${key} ${result.row}`;
    const tick = make("input", {
      type: "checkbox",
      checked: ticked.has(id),
      name: `tick ${id}`,
      tabIndex: i ? -1 : 0,
      "aria-label": `select ${joined(rank, word)}`,
    });
    button.addEventListener("focus", () => {
      for (const other of button.closest("ol").querySelectorAll("input")) other.tabIndex = other === tick ? 0 : -1;
    });
    tick.addEventListener("change", () => {
      if (tick.checked) ticked.set(id, takeAway(key, r, result));
      else ticked.delete(id);
      tell();
    });
    const item = make(
      "li",
      { className: kind },
      button,
      make(
        "span",
        { className: "rank" },
        `${sign} ${result.rank || ""}`.trim(),
        word ? make("span", { className: "word" }, ` ${word}`) : "",
      ),
      move.shown ? make("span", { className: "moved", "aria-hidden": "true" }, move.shown) : "",
      make("span", {}, joined(shortCamera(camid), short(pid))),
      make("span", {}, `distance ${distance}`),
      make("span", { className: "file", title: name }, name || `row ${result.row}`),
      make("label", { className: "tick" }, tick, "select"),
    );
    Object.assign(item.dataset, { rank: result.rank, status, row: result.row });
    return item;
  }

  // --- what is taken away

  const takeAway = (key, r, result) => {
    const [path, pid, camid] = source.image(`g${result.row}`);
    return {
      run: runs[r].name,
      asked: key[0] === "q" ? "query" : "gallery",
      query: Number(key.slice(1)),
      query_path: imageOf(key)[0],
      rank: result.rank || null,
      gallery: result.row,
      path,
      pid,
      camid,
      distance: result.distance,
      status: STATUS[result.code].status,
    };
  };

  function tell() {
    const n = ticked.size;
    selected.textContent = n ? `${count(n, "result")} selected` : "nothing selected";
    save.textContent = n ? "save the selection as CSV" : "save this list as CSV";
    clear.disabled = n === 0;
    const rows = [...ticked.keys()].map((id) => id.split(" "));
    change({
      ticked: rows.map(([r, key, row]) => [Number(r), key, Number(row)]),
      view: { key: shown.key, camera: state.camera, excluded: state.excluded },
    });
  }

  save.addEventListener("click", () => {
    let rows = [...ticked.values()];
    if (!rows.length) {
      rows = [...lists.querySelectorAll(".run")].flatMap((box, r) => {
        const visible = new Set([...box.querySelectorAll("li")].map((li) => Number(li.dataset.row)));
        const record = shown.records[r];
        return resultsOf(record)
          .filter((result) => visible.has(result.row))
          .map((result) => takeAway(shown.key, r, result));
      });
    }
    const href = URL.createObjectURL(new Blob([csv(rows)], { type: "text/csv" }));
    make("a", { href, download: "selection.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(href), 1000);
  });
  clear.addEventListener("click", () => {
    ticked.clear();
    draw();
  });
  resultCamera.addEventListener("change", () => {
    state.camera = resultCamera.value;
    draw();
  });
  excluded.addEventListener("change", () => {
    state.excluded = excluded.checked;
    draw();
  });

  // --- all of it

  for (const [kind, colour] of Object.entries(about.colours)) root.style.setProperty(`--${kind}`, colour);

  const header = make("header", {}, heading(0, {}, about.title));
  for (const run of runs) {
    header.append(make("p", {}, two ? make("b", {}, `${run.name}: `) : "", run.scores));
  }
  if (scored) {
    const key = [
      ["right", "✓ right: same person"],
      ["wrong", "✗ wrong: somebody else"],
      ["excluded", "– excluded: left out of the ranking, with the reason"],
    ];
    const entries = key.map(([kind, text]) => make("span", { className: kind }, make("i"), text));
    header.append(make("p", { className: "key" }, ...entries));
  }
  header.append(
    make(
      "details",
      {},
      make("summary", {}, "what is shown, and how"),
      ...about.notes.map((note) => make("p", {}, note)),
    ),
  );
  const picker = make(
    "nav",
    { className: "picker", "aria-label": "queries" },
    labelled("order", sort),
    labelled("identity, or part of the file name", search),
    labelled("camera of the query", queryCamera),
    found,
    strip,
  );
  answer.append(
    make("div", { className: "controls" }, back, labelled("camera of the results", resultCamera),
      make("label", { className: "check" }, excluded, "excluded images, in their place"),
      make("div", { className: "selection" }, selected, save, clear)),
    asked,
    lists,
  );
  root.replaceChildren(header, make("div", { className: "columns" }, picker, answer), said);
  pick();
  const linked = page ? location.hash.slice(1) : "";
  if (/^[qg]\d+$/.test(linked) && source.has(linked)) go(linked);
  else if (order.length) go(`q${queries.row[order[0]]}`);
  if (page) {
    window.addEventListener("hashchange", () => {
      const key = location.hash.slice(1);
      if (key !== state.key && /^[qg]\d+$/.test(key) && source.has(key)) go(key);
    });
  }
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
  const box = make("div", {});
  const trouble = make(
    "p",
    { role: "alert", hidden: true },
    "Python has not answered yet: the kernel is busy, or was stopped. If stopped, run this cell again.",
  );
  el.append(trouble, box);
  const source = fromKernel(model, model.get("_about"), (late) => (trouble.hidden = !late));
  start(box, source, {
    level: 3,
    page: false,
    change: ({ ticked, view }) => {
      model.set("_ticked", ticked);
      model.set("_view", view);
      model.save_changes();
    },
  });
  return () => {
    theme.disconnect();
    source.close();
  };
}

// --- in a page of its own

const inPage = document.getElementById("ranked-lists");
if (inPage) {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  start(inPage, fromPage(read("ranked-lists-data"), read("ranked-lists-photos")), { level: 1, page: true });
}

export default { render };
