// The table of a report: sorted by a click on a column's title, filtered by what is typed. Without this script it is a
// plain table. Rows are read once; a cell sorts by its data-v where it has one, else by its text.
"use strict";
(() => {
  const table = document.getElementById("table"), body = table.tBodies[0], rows = [...body.rows];
  const search = document.getElementById("search"), found = document.getElementById("found");
  const heads = [...table.tHead.rows[0].cells], numbers = { inf: Infinity, "-inf": -Infinity };
  search.parentElement.style.display = "flex";

  const collator = new Intl.Collator("en", { numeric: true });
  const isText = (column) => heads[column].classList.contains("text") && !(rows[0] && rows[0].cells[column].dataset.v);
  const value = (row, column) => {
    const cell = row.cells[column], text = cell.dataset.v ?? cell.textContent.trim();
    if (isText(column)) return cell.title || text;
    return text in numbers ? numbers[text] : parseFloat(text);
  };
  const sort = (column, direction) => {
    let sorted = rows;
    if (direction) {
      const sign = direction === "ascending" ? 1 : -1, keyed = rows.map((row, place) => [value(row, column), place]);
      const compare = isText(column) ? (a, b) => collator.compare(a, b) : (a, b) => a - b || 0;
      const isMissing = (key) => key === "" || Number.isNaN(key); // what has no value comes last, whichever way
      keyed.sort(([a, i], [b, j]) => isMissing(a) - isMissing(b) || (isMissing(a) ? 0 : sign * compare(a, b)) || i - j);
      sorted = keyed.map(([, place]) => rows[place]);
    }
    body.append(...sorted);
    heads.forEach((head, i) => head.setAttribute("aria-sort", i === column && direction ? direction : "none"));
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    const order = isText(column) ? ["ascending", "descending"] : ["descending", "ascending"];
    button.addEventListener("click", () => {
      const next = order.indexOf(head.getAttribute("aria-sort")) + 1; // the third click gives the file's own order back
      sort(column, order[next]);
    });
  });

  const texts = rows.map((row) => [...row.cells].slice(0, 4).map((cell) => `${cell.textContent} ${cell.title}`).join(" ").toLowerCase());
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    rows.forEach((row, place) => {
      const fits = words.every((word) => texts[place].includes(word));
      row.hidden = !fits;
      n += fits;
    });
    found.textContent = words.length ? `${n} of ${rows.length}` : "";
  });
})();
