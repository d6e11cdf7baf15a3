// Helpers of the ranked-list browser and of the map of embeddings; Python puts them before either.

// An element; children that are null or "" are left out.
function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node && !name.startsWith("aria")) node[name] = value;
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

const button = (text, onclick, properties = {}) => make("button", { type: "button", onclick, ...properties }, text);

function saveCsv(file, columns, rows) {
  const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const cells = (row) => columns.map((name) => quoted(String(row[name] ?? "")));
  const text = [columns, ...rows.map(cells)].map((line) => line.join(",") + "\n").join("");
  const href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  make("a", { href, download: file }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}
