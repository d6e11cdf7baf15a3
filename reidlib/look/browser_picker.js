// The picker: which query? Orders, search, and a strip of photographs. A part of browser.js.

function makePicker(app) {
  const { queries } = app;
  let [order, seed] = [[], 0]; // places in the table of queries
  let asked = "q0"; // the query that was in view last
  const choices = orders(app, (i) => luck(i, seed));
  const sort = menu("order", choices.map(([text], n) => [n, text]));
  const search = make("input", { type: "search", name: "search", autocomplete: "off" });
  const filters = filterControls(app);
  const found = make("p", { className: "note" });
  const strip = makeStrip(app);
  const placeOf = (key) => order.indexOf(sideOf(key) === "query" ? queries.row.indexOf(rowOf(key)) : -1);

  function pick() {
    const [text, by] = choices[sort.value];
    // Queries without a match have no AP: they stand last in both directions.
    const value = (i) => (Number.isNaN(by(i)) ? Infinity : by(i));
    order = matching(app, search.value, filters.value()).sort((a, b) => value(a) - value(b) || a - b);
    // A menu cuts long names off, and with them the direction.
    found.textContent = howMany(app, order.length, app.two && app.scored ? `${text}: ` : "");
    strip.fill(order);
  }

  // Go to a neighbour, in the chosen order, of the query that was in view last.
  function step(by, focus = true) {
    const at = placeOf(asked);
    const next = order[at < 0 ? 0 : at + by];
    if (next !== undefined) app.answer.go(`q${queries.row[next]}`, { focus, reveal: true });
  }

  function markCurrent() {
    if (sideOf(app.key) === "query") asked = app.key;
    strip.mark();
  }

  sort.addEventListener("change", () => ((seed += 1), pick()));
  search.addEventListener("input", pick);
  for (const control of filters.all) control.addEventListener("change", pick);
  const fold = folding("search and filter", labelled("identity, or part of the file name", search), ...filters.nodes);
  const parts = [labelled("order", sort), fold, found, strip.node];
  const node = make("nav", { className: "picker", "aria-label": "queries" }, ...parts);
  const first = () => (order.length ? `q${queries.row[order[0]]}` : null);
  return { node, pick, reveal: () => strip.reveal(placeOf(app.key)), step, markCurrent, first };
}

// Photographs of queries in their order, drawn as far as they are looked at.
function makeStrip(app) {
  let order = [];
  const node = make("ol", { className: "strip", "aria-label": "queries, in the chosen order" });
  const buttons = () => [...node.querySelectorAll("button")];

  function fill(places) {
    order = places;
    node.replaceChildren();
    node.scrollTop = node.scrollLeft = 0;
    more();
  }

  function more(end = node.children.length + PAGE) {
    for (const i of order.slice(node.children.length, end)) {
      const button = queryButton(app, i);
      button.tabIndex = node.children.length ? -1 : 0;
      node.append(make("li", {}, button));
    }
    mark();
  }

  // Draw as far as a place, and bring that into sight.
  function reveal(at) {
    if (at < 0) return;
    if (node.children.length <= at) more(at + PAGE);
    const { offsetTop, offsetLeft } = node.children[at];
    node.scrollTop = offsetTop - node.clientHeight / 3;
    node.scrollLeft = offsetLeft - node.clientWidth / 3;
  }

  function mark() {
    for (const button of buttons()) button.ariaCurrent = button.dataset.key === app.key ? "true" : null;
  }

  roving(node, buttons, more);
  node.addEventListener("scroll", () => {
    const below = node.scrollHeight - node.scrollTop - node.clientHeight;
    const beside = node.scrollWidth - node.scrollLeft - node.clientWidth;
    if (below + beside < 400 && node.children.length < order.length) more();
  });
  return { node, fill, reveal, mark };
}

// What the queries can be filtered by, as far as it is known here; `value` is what is chosen, by name.
function filterControls({ about, runs, queries, two, scored, source }) {
  const kinds = (name, r) => ["wrong", "right"].map((kind) => [`${kind} ${r}`, two ? `${kind} in ${name}` : kind]);
  const named = [...new Set(Object.values(source.why.causes ?? {}))].sort().map((cause) => [cause, cause]);
  const near = [...new Set(queries.near)].filter((camid) => camid >= 0).sort((a, b) => a - b);
  const percents = (name) => make("input", { type: "number", name, min: 0, max: 100, placeholder: name === "low" ? 0 : 100 });
  const able = [
    ["camera of the query", menu("query-camera", cameras(about.cameras.query)), about.cameras.query.length > 1],
    ["camera at rank 1", menu("near-camera", cameras(near)), near.length > 1],
    ["AP from, %", percents("low"), scored],
    ["AP to, %", percents("high"), scored],
    ["at rank 1", menu("rank-1", [["", "all"], ...runs.flatMap(({ name }, r) => kinds(name, r))]), scored],
    ["cause", menu("cause", [["", "all"], ...named]), named.length > 0],
  ].filter(([, , known]) => known);
  const all = able.map(([, control]) => control);
  const value = () => Object.fromEntries(all.map((control) => [control.name, control.value]));
  return { all, value, nodes: able.map(([text, control]) => labelled(text, control)) };
}

// Orders of the queries: what the menu says, and what is sorted ascending.
function orders({ runs, queries, two, scored }, random) {
  const ap = queries.ap.map((run) => run.map((value) => value ?? NaN));
  const byAp = runs.flatMap(({ name }, r) => {
    const own = two ? `AP of ${name}` : "AP";
    return [[`${own}, worst first`, (i) => ap[r][i]], [`${own}, best first`, (i) => -ap[r][i]]];
  });
  if (two) {
    const change = `AP from ${runs[0].name} to ${runs[1].name}`;
    byAp.push([`largest gain of ${change}`, (i) => ap[0][i] - ap[1][i]]);
    byAp.push([`largest loss of ${change}`, (i) => ap[1][i] - ap[0][i]]);
  }
  return [...(scored ? byAp : []), ["random order", random], ["order of the query table", (i) => i]];
}

// Places of the queries that fit what was typed and what was chosen.
function matching({ queries, source }, typed, chosen) {
  const [kind, r] = (chosen["rank-1"] ?? "").split(" ");
  const unlike = (name, value) => chosen[name] && String(value) !== chosen[name];
  const outside = (ap) => (chosen.low && !(100 * ap >= chosen.low)) || (chosen.high && !(100 * ap <= chosen.high));
  const text = typed.trim().toLowerCase();
  const person = /^\d+$/.test(text) && queries.pid.includes(Number(text)) ? Number(text) : null;
  return [...queries.row.keys()].filter((i) => {
    if (unlike("query-camera", queries.camid[i]) || unlike("near-camera", queries.near[i])) return false;
    if (kind && queries.wrong[r][i] !== (kind === "wrong")) return false;
    if (chosen.cause && source.why.causes[`q${queries.row[i]}`] !== chosen.cause) return false;
    if (outside(queries.ap[0][i] ?? NaN)) return false;
    // A number is an identity, where there is such a one; all else is part of a file name.
    return person === null ? queries.name[i].toLowerCase().includes(text) : queries.pid[i] === person;
  });
}

function howMany({ about, queries }, n, direction) {
  const inFile = queries.row.length;
  const [all, some] = [about.total.toLocaleString("en"), inFile < about.total];
  const missing = some ? ` Or it is not in this file, which has ${inFile.toLocaleString("en")} of ${all}.` : "";
  if (n === 0) return `No query fits. Clear the search, or change a filter.${missing}`;
  const of = count(inFile, "query", "queries");
  return `${direction}${n.toLocaleString("en")} of ${of}${some ? ` in this file; the test has ${all}` : ""}`;
}

function queryButton(app, i) {
  const { queries, two, scored } = app;
  const key = `q${queries.row[i]}`;
  const ap = queries.ap.map((run) => run[i]);
  const name = last(queries.name[i]); // of somebody unknown, all that there is
  const lines = [joined(short(queries.pid[i]) || name || who(queries.pid[i]), shortCamera(queries.camid[i]))];
  if (scored && two && ap[0] !== null && ap[1] !== null) {
    lines.push(`${percent(ap[0])} → ${percent(ap[1])}`, `${points(ap[1] - ap[0])} points`);
  } else if (scored) lines.push(ap[0] === null ? "no match" : `AP ${percent(ap[0])}`);
  const photo = app.photo(key, `query, ${joined(who(queries.pid[i]), where(queries.camid[i]))}`);
  const node = button(photo, () => app.answer.go(key), { title: queries.name[i], "data-key": key });
  const words = lines.flatMap((line, n) => (n ? [make("br"), line] : [line]));
  node.append(make("span", { className: "words" }, ...words, app.tags.mark(key)));
  return node;
}
