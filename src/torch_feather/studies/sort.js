// Tables of three or more rows sort by a column when its header is activated: numbers first, empty
// cells last. The first click is descending for numbers, since larger ones are of interest.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (!table.tHead || !body || body.rows.length < 3 || body.querySelector("[rowspan]")) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const text = (row) => row.cells[column].textContent.trim().replace("−", "-").replaceAll(",", "");
    const number = (row) => (/^1\//.test(text(row)) ? 1 / text(row).slice(2) : parseFloat(text(row)));
    const button = document.createElement("button");
    button.append(...head.childNodes);
    if (!button.textContent.trim()) return;
    head.append(button);
    button.addEventListener("click", () => {
      const numeric = [...body.rows].some((row) => !isNaN(number(row)));
      const sign = { descending: 1, ascending: -1 }[head.ariaSort] ?? (numeric ? -1 : 1);
      const compare = (a, b) =>
        numeric ? sign * (number(a) - number(b)) || isNaN(number(a)) - isNaN(number(b))
          : sign * text(a).localeCompare(text(b));
      for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
      head.ariaSort = sign > 0 ? "ascending" : "descending";
      body.append(...[...body.rows].sort(compare));
    });
  });
}
