// Tables of three or more rows sort by a column when its header is activated: numbers by value,
// descending first, and empty cells last. On a narrow screen, `wordy` tables show one cell a line.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (!table.tHead || !body || body.querySelector("[rowspan], [colspan]")) continue;
  const heads = [...table.tHead.rows[0].cells];
  const wordy = (cell) => cell.textContent.length > 40;
  const wide = table.offsetWidth > table.parentElement.clientWidth + 1;
  table.classList.toggle("wordy", wide || [...body.querySelectorAll("td")].some(wordy));
  heads.forEach((head, column) => {
    const name = head.textContent.trim();
    for (const { cells } of body.rows)
      if (cells[column].textContent.trim()) cells[column].dataset.name = name;
    if (body.rows.length < 3 || !name || head.querySelector("a")) return;
    const text = (row) => row.cells[column].textContent.trim().replace("−", "-").replaceAll(",", "");
    const number = (row) => (/^1\//.test(text(row)) ? 1 / text(row).slice(2) : parseFloat(text(row)));
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const numeric = [...body.rows].some((row) => !isNaN(number(row)));
      const sign = { descending: 1, ascending: -1 }[head.ariaSort] ?? (numeric ? -1 : 1);
      const compare = (a, b) =>
        !numeric ? sign * text(a).localeCompare(text(b))
          : isNaN(number(a)) - isNaN(number(b)) || sign * (number(a) - number(b)) || 0;
      for (const other of heads) other.ariaSort = null;
      head.ariaSort = sign > 0 ? "ascending" : "descending";
      body.append(...[...body.rows].sort(compare));
    });
  });
}
