// A query with its list in each run, and the table of what is ticked. A part of browser.js.

function makeAnswer(app) {
  const { about, page, two } = app;
  const node = make(page ? "main" : "section", { className: "answer", "aria-label": "ranked lists" });
  const back = button("← query before", goBack, { className: "back" });
  const steps = [["‹ previous", -1], ["next ›", 1]].map(([text, by]) =>
    button(text, () => app.picker.step(by, false), { className: "step", title: "query in the chosen order" }));
  const camera = menu("result-camera", cameras(about.cameras.gallery));
  const excluded = make("input", { type: "checkbox", name: "excluded", checked: true });
  const query = make("div", { className: "asked" });
  const lists = make("div", { className: two ? "lists two" : "lists" });
  // Where Back leads: in a page the browser's own history, in a notebook these keys.
  const before = [];
  const depth = () => (page ? history.state?.depth ?? 0 : before.length);

  async function go(key, { keep = true, focus = false, reveal = false } = {}) {
    const kept = keep && app.key && app.key !== key;
    if (kept) before.push(app.key);
    if (page) history[kept ? "pushState" : "replaceState"]({ depth: depth() + (kept ? 1 : 0) }, "", `#${key}`);
    app.key = key;
    node.setAttribute("aria-busy", "true");
    if (reveal) app.picker.reveal();
    app.picker.markCurrent();
    const records = await app.source.lists(key, app.topk).catch((error) => ({ error }));
    if (app.key !== key) return; // another query was chosen meanwhile
    node.removeAttribute("aria-busy");
    if (records.error) {
      query.replaceChildren(make("p", { role: "alert" }, `Python could not answer: ${records.error.message}`));
      lists.replaceChildren();
      return;
    }
    app.shown = { key, records };
    draw();
    if (focus) query.querySelector("h2,h3,h4,h5")?.focus();
  }

  function goBack() {
    if (!depth()) return;
    if (page) history.back();
    else go(before.pop(), { keep: false, focus: true });
  }

  function draw() {
    query.replaceChildren(...drawQuery(app));
    back.disabled = depth() === 0;
    lists.replaceChildren(...app.shown.records.map((_, r) => drawList(app, r)));
    app.selection.tell();
  }

  const filter = () => (Object.assign(app, { camera: camera.value, excluded: excluded.checked }), draw());
  for (const control of [camera, excluded]) control.addEventListener("change", filter);
  const check = make("label", { className: "check" }, excluded, "excluded images");
  const ofCamera = about.cameras.gallery.length > 1 ? labelled("camera of the results", camera) : "";
  const fold = folding("filter and save results", ofCamera, check, app.selection.node);
  node.append(make("div", { className: "controls" }, back, ...steps, fold), query, lists);
  return { node, go, goBack, draw };
}

function resultsOf(record) {
  const { rows, ranks, distances, status } = record ?? { rows: [] };
  return rows.map((row, i) => ({ row, rank: ranks[i], distance: distances[i], code: status[i] }));
}
const matchRanks = (record) =>
  new Map(resultsOf(record).flatMap(({ row, rank, code }) => (code === "m" ? [[row, rank]] : [])));

// The query in view: its photograph, who it is, and, of two runs, what changed. Also says it aloud.
function drawQuery(app) {
  const { key, records } = app.shown;
  const [name, pid, camid] = app.image(key);
  const unnamed = pid < 0 && camid < 0 && name; // else nothing is known but the file
  const title = `Query: ${unnamed ? last(name) : joined(who(pid), where(camid))}`;
  const facts = [name || `row ${rowOf(key)} of the ${sideOf(key)} table`];
  if (sideOf(key) === "gallery") facts.push("a gallery image, asked as a query");
  if (app.two && records[0]?.ap != null && records[1]?.ap != null) facts.push(changes(app));
  const texts = records.map((record, r) => statement(app, record, app.runs[r].name));
  const named = texts.map((text, r) => (app.two ? `${app.runs[r].name}: ${text}` : text));
  app.said.textContent = `${title}. ${named.join(" ")}`;
  const lines = facts.map((fact, i) => make("p", { className: i ? "" : "file" }, fact));
  const photo = app.photo(key, `query, ${joined(who(pid), where(camid))}`);
  const larger = button("larger view", (event) => app.larger.open(event.target));
  const cause = app.source.why.causes?.[key];
  if (cause) lines.push(make("p", {}, `Cause, as 14_why_wrong names it: ${cause}`));
  const linked = app.page && app.source.why.map?.includes(key);
  const map = linked ? make("a", { href: `embedding_map.html#${key}` }, "on the map") : "";
  const tags = make("details", { open: app.tags.has(key) }, make("summary", {}, "tag this image"), app.tags.form(key));
  const ways = make("p", { className: "ways" }, larger, map, app.tags.mark(key));
  return [photo, make("div", {}, app.heading(1, { tabIndex: -1 }, title), ...lines, ways, tags)];
}

function changes({ shown, runs }) {
  const [first, second] = shown.records;
  const there = matchRanks(second);
  const moves = [...matchRanks(first)].map(([row, rank]) => rank - there.get(row));
  return (
    `AP ${percent(first.ap)} in ${runs[0].name}, ${percent(second.ap)} in ${runs[1].name}: ` +
    `${points(second.ap - first.ap)} points. Of ${count(moves.length, "match", "matches")}, ` +
    `${moves.filter((m) => m > 0).length} moved up, ${moves.filter((m) => m < 0).length} down.`
  );
}

// How many ranked images of the list in view are shown.
const shownOf = (app) => Math.min(app.topk, app.source.most(app.shown.key));

function statement(app, record, name) {
  const topk = shownOf(app);
  if (record === null) return `${name || "This run"} knows the distances of its own queries only: this image cannot ask here.`;
  const ranks = [...matchRanks(record).values()];
  if (record.status.includes("u")) return "Nothing is right or wrong here, for it is not known who is asked for.";
  if (ranks.length === 0) return "No match: the gallery holds no other image of this person that counts.";
  const first = ranks.filter((rank) => rank <= topk).length;
  return (
    `AP ${percent(record.ap, 2)} (Market's definition: ${percent(record.ap_market, 2)}). ` +
    `${count(ranks.length, "match", "matches")}, first at rank ${Math.min(...ranks).toLocaleString("en")}` +
    (ranks.length > 1 ? `, last at rank ${Math.max(...ranks).toLocaleString("en")}` : "") +
    `; ${first} of them among the first ${topk}.`
  );
}

// The list of one run, of the query in view.
function drawList(app, r) {
  const { two } = app;
  const [topk, { name }, record] = [shownOf(app), app.runs[r], app.shown.records[r]];
  const box = make("section", { className: "run", "aria-label": `list of ${name || "this run"}` });
  if (two) box.append(app.heading(2, {}, name));
  box.append(make("p", { className: "statement" }, statement(app, record, name)));
  if (record === null) return box;
  const all = resultsOf(record);
  const { near, missed } = parted(app, all);
  const there = matchRanks(two ? app.shown.records[1 - r] : null); // of the matches in the other run
  box.append(filterNotes(app, all, near));
  const section = (results, label) => {
    const list = make("ol", { className: "results", "aria-label": label });
    const shown = results.filter((result) => fits(app, result));
    list.append(...shown.map((result, i) => drawResult(app, r, result, there.get(result.row), i === 0)));
    roving(list, () => [...list.querySelectorAll(".photo")]);
    return list;
  };
  box.append(section(near, `the first ${topk}, nearest first`), moreButton(app, r, near.length));
  if (missed.length) {
    const title = `Missed: ${count(missed.length, "match", "matches")} beyond rank ${topk}`;
    const places = missed.map((result) => result.rank.toLocaleString("en"));
    const note = make("p", { className: "note" }, `at rank ${places.join(", ")}`);
    box.append(app.heading(two ? 3 : 2, {}, title), note, section(missed, "missed matches"));
  }
  return box;
}

// The first results, those left out among them; and the matches beyond, whatever else is known there.
function parted(app, all) {
  const topk = shownOf(app);
  if (all.every(({ rank }) => rank <= topk)) return { near: all, missed: [] };
  const end = 1 + all.findLastIndex(({ rank }) => rank > 0 && rank <= topk);
  return { near: all.slice(0, end), missed: all.slice(end).filter(({ code }) => code === "m") };
}

// All results of a list that are on the screen.
const inList = (app, record) => Object.values(parted(app, resultsOf(record))).flat().filter((result) => fits(app, result));

function moreButton(app, r, n) {
  const [topk, most] = [shownOf(app), app.source.most(app.shown.key)];
  if (topk >= most) return "";
  const more = async () => {
    app.topk = Math.min(most, topk + app.about.topk);
    await app.answer.go(app.shown.key);
    const list = app.answer.node.querySelectorAll(".run")[r].querySelector("ol");
    list.querySelectorAll(".photo")[n]?.focus(); // the first of the new ones
  };
  return button(`show ${app.about.topk} more`, more, { className: "more" });
}

function fits(app, result) {
  const camid = app.source.image(`g${result.row}`)[2];
  return (!app.camera || String(camid) === app.camera) && (app.excluded || result.rank > 0);
}

// What the filters hide: a paragraph, or none.
function filterNotes(app, all, near) {
  const notes = [];
  const dropped = all.filter((result) => result.rank === 0).length;
  if (dropped && !app.excluded) notes.push(`Hidden: ${count(dropped, "image")} that the protocol leaves out.`);
  if (app.camera) {
    const fitting = near.filter((result) => fits(app, result)).length;
    notes.push(`Only ${where(Number(app.camera))} is shown: ${fitting} of ${near.length}.`);
    notes.push("Ranks and AP are those of the whole list.");
  }
  return notes.length ? make("p", { className: "note" }, notes.join(" ")) : "";
}

// A result of run r: its photograph, which makes it the query, and what is known of it.
function drawResult(app, r, result, there, first) {
  const { kind, sign, word, status } = STATUS[result.code];
  const key = `g${result.row}`;
  const can = app.source.has(key);
  const [name, pid, camid] = app.source.image(key);
  const rank = result.rank ? `rank ${result.rank}` : "not ranked";
  const move = moveOf(app, r, result, there);
  const place = pid < 0 && camid < 0 && name ? last(name) : where(camid);
  const alt = joined(rank, word, pid >= 0 ? who(pid) : "", place, move.said);
  const tick = app.selection.tickOf(r, result, joined(rank, word));
  const title = can ? "make this image the query" : "there is no list of its own here";
  const choose = () => {
    if (can) app.answer.go(key, { focus: true });
    else app.said.textContent = "There is no list of this image here.";
  };
  const photo = button(app.photo(key, alt), choose, { className: "photo", title, "aria-disabled": can ? null : "true" });
  const label = `larger view of ${joined(rank, word)}`;
  const larger = button("⤢", () => app.larger.open(larger), { className: "enlarge", title: label, "aria-label": label });
  // Larger view and tick of a result are the tab stops after its photograph.
  const after = [larger, tick];
  for (const node of [photo, ...after]) node.tabIndex = first ? 0 : -1;
  photo.addEventListener("focus", () => {
    const others = photo.closest("ol").querySelectorAll("input, .enlarge");
    for (const other of others) other.tabIndex = after.includes(other) ? 0 : -1;
  });
  const said = word ? make("span", { className: "word" }, ` ${word}`) : "";
  return make("li", { className: kind, "data-rank": result.rank, "data-status": status, "data-row": result.row }, photo,
    make("span", { className: "rank" }, `${sign} ${result.rank || ""}`.trim(), said),
    move.shown ? make("span", { className: "moved", "aria-hidden": "true" }, move.shown) : "",
    make("span", {}, joined(shortCamera(camid), short(pid))),
    make("span", {}, `distance ${result.distance.toPrecision(4)}`), // all the digits that are there
    make("div", { className: "tools" }, make("label", { className: "tick" }, tick, "select"), larger),
    app.tags.mark(key),
    make("span", { className: "file", title: name }, name || `row ${result.row}`)); // it grows in focus: last
}

// Where a match stands in the other run, for the eye and in words; from the first run to the second.
function moveOf({ runs }, r, result, there) {
  if (there === undefined || result.code !== "m") return { shown: "", said: "" };
  const other = `rank ${there} in ${runs[1 - r].name}`;
  const up = r ? there - result.rank : result.rank - there;
  if (up === 0) return { shown: "= same rank", said: `same ${other}` };
  const [sign, word] = up > 0 ? ["▲", "up"] : ["▼", "down"];
  const [places, side] = [Math.abs(up), r ? "from" : "to"];
  const said = `moved ${word} ${count(places, "place")}, ${side} ${other}`;
  return { shown: `${sign} ${places}, ${side} ${there}`, said };
}

// --- what is taken away

function makeSelection(app) {
  const ticked = new Map(); // "run key row" -> row of the table to take away
  const selected = make("span", { className: "selected", "aria-live": "polite" });
  const save = button("", () => {
    const rowsOf = (record, r) => inList(app, record).map((result) => tableRow(app, r, result));
    const rows = ticked.size ? [...ticked.values()] : app.shown.records.flatMap(rowsOf);
    saveCsv("selection.csv", COLUMNS, rows);
  });
  const clear = button("clear", () => (ticked.clear(), app.answer.draw()));

  function tell() {
    const n = ticked.size;
    selected.textContent = n ? `${count(n, "result")} selected` : "nothing selected";
    save.textContent = n ? "save the selection as CSV" : "save this list as CSV";
    clear.disabled = n === 0;
    const rows = [...ticked.keys()].map((id) => id.split(" ")).map(([r, key, row]) => [Number(r), key, Number(row)]);
    app.change(rows, { key: app.shown.key, camera: app.camera, excluded: app.excluded, topk: app.topk });
  }

  function tickOf(r, result, words) {
    const id = `${r} ${app.shown.key} ${result.row}`;
    const named = { name: `tick ${id}`, "aria-label": `select ${words}` };
    const tick = make("input", { type: "checkbox", checked: ticked.has(id), ...named });
    tick.addEventListener("change", () => {
      if (tick.checked) ticked.set(id, tableRow(app, r, result));
      else ticked.delete(id);
      tell();
    });
    return tick;
  }

  return { node: make("div", { className: "selection" }, selected, save, clear, app.tags.save), tell, tickOf };
}

function tableRow(app, r, result) {
  const { key } = app.shown;
  const [path, pid, camid] = app.source.image(`g${result.row}`);
  return {
    ...{ run: app.runs[r].name, asked: sideOf(key), query: rowOf(key), query_path: app.image(key)[0] },
    ...{ rank: result.rank || null, gallery: result.row, path, pid, camid },
    ...{ distance: result.distance, status: STATUS[result.code].status },
  };
}
