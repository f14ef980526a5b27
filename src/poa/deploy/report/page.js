"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);

  /** An element with attributes and children; text is never read as HTML. */
  function make(tag, attributes = {}, ...children) {
    const isSvg = ["g", "circle", "line", "path", "polyline", "rect", "text", "title"].includes(tag);
    const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  /** A number for people: at most so many significant digits, but all before the point. */
  function format(value, digits = 4) {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-4 || size >= 1e7)) return value.toPrecision(digits);
    const decimals = size === 0 ? 0 : Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
    return grouped(Number(value.toFixed(decimals)).toString());
  }
  const grouped = (text) => text.replace(/^-?\d+/, (whole) => whole.replace(/\B(?=(\d{3})+$)/g, ","));
  const fixed = ({ factor, decimals }, value) => grouped((value / factor).toFixed(decimals));
  const capital = (text) => text[0].toUpperCase() + text.slice(1);

  // ---- Light and dark ----------------------------------------------------------------------------------------------

  const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
  function showTheme() {
    const theme = document.documentElement.dataset.theme ?? (systemDark.matches ? "dark" : "light");
    $("theme").textContent = theme === "dark" ? "Light" : "Dark";
    $("theme").setAttribute("aria-label", `Switch to ${theme === "dark" ? "light" : "dark"} colours`);
    return theme;
  }
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = showTheme() === "dark" ? "light" : "dark";
    showTheme();
  });
  systemDark.addEventListener("change", showTheme);
  $("theme").hidden = false;
  showTheme();

  // ---- The choice: the rule of poa.deploy.select -------------------------------------------------------------------

  const state = { device: 0, quality: 0, cost: "num_params", limits: new Map() };

  const device = () => data.devices[state.device] ?? { columns: [], sources: [], fit_error: null, options: "", export: " --to timm --out exports" };
  const costs = () => {
    const own = device().columns;
    return [...data.sizes.filter(({ name }) => !own.some((column) => column.name === name)), ...own];
  };
  const quality = () => data.qualities[state.quality];
  const vertical = () => (data.hasQuality ? quality() : data.sizes[state.cost === "flops" ? 0 : 1]);
  const costNamed = (name) => costs().find((column) => column.name === name);

  /** A limit in the numbers of the column's values, with the rounding of `poa select`. */
  const bound = (column, limit) => limit * column.factor;

  /** Whether sub-network a is nowhere worse than b, and somewhere better; more of `good` is better, of others less. */
  function dominates(a, b, good, columns) {
    if (good[a] < good[b] || columns.some(({ values }) => values[a] > values[b])) return false;
    return good[a] > good[b] || columns.some(({ values }) => values[a] < values[b]);
  }

  /** What fits, the best of it, the next on the front, and how many sub-networks lack a figure that is needed. */
  function choose() {
    const good = quality().values;
    const bounds = [...state.limits].map(([name, limit]) => [costNamed(name), limit]).filter(([column]) => column);
    const rows = data.names.map((_, row) => row);
    const usable = rows.filter((row) => good[row] !== null && bounds.every(([column]) => column.values[row] !== null));
    const fits = usable.filter((row) => bounds.every(([column, limit]) => column.values[row] <= bound(column, limit)));
    const latency = costNamed("latency_ms")?.values ?? [];
    const params = costNamed("num_params").values;
    const cost = (values, row) => values[row] ?? Infinity;
    const ranked = fits.sort(
      (a, b) => good[b] - good[a] || cost(latency, a) - cost(latency, b) || params[a] - params[b] || a - b || 0,
    );
    const compared = new Set(bounds.map(([column]) => column));
    if (costNamed("latency_ms") && usable.every((row) => latency[row] !== null)) compared.add(costNamed("latency_ms"));
    if (data.hasQuality) compared.add(costNamed("num_params"));
    const isOnFront = (row) => !usable.some((other) => dominates(other, row, good, [...compared]));
    return {
      fits: new Set(fits),
      pick: ranked[0],
      second: ranked.slice(1).find(isOnFront),
      numLeftOut: rows.length - usable.length,
      bounds,
      usable,
    };
  }

  /** Where nothing fits: for each limit the least value that lets something fit, the other limits kept. */
  function relaxations({ bounds, usable }) {
    return bounds.flatMap(([column], number) => {
      const kept = bounds.filter((_, other) => other !== number);
      const within = usable.filter((row) => kept.every(([other, limit]) => other.values[row] <= bound(other, limit)));
      return within.length ? [[column, Math.min(...within.map((row) => column.values[row]))]] : [];
    });
  }

  /** Where no single limit helps: those that the row with the least total relative excess needs. */
  function jointly({ bounds, usable }) {
    const excess = (row) => bounds.reduce((sum, [column, limit]) => sum + Math.max(0, column.values[row] / bound(column, limit) - 1), 0);
    const row = usable.reduce((a, b) => (excess(b) < excess(a) ? b : a));
    return bounds.filter(([column, limit]) => column.values[row] > bound(column, limit)).map(([column]) => [column, column.values[row]]);
  }

  // ---- Scales ------------------------------------------------------------------------------------------------------

  const along = (scale) => (scale.log ? Math.log : (value) => value);
  function share(scale, value) {
    const at = along(scale);
    return (at(value) - at(scale.low)) / (at(scale.high) - at(scale.low));
  }
  function valueAt(scale, part) {
    const at = along(scale);
    const value = at(scale.low) + part * (at(scale.high) - at(scale.low));
    return scale.log ? Math.exp(value) : value;
  }
  const rounded = (value) => Number(value.toPrecision(3));

  // ---- The front ---------------------------------------------------------------------------------------------------

  const MARGIN = { left: 54, right: 16, top: 32, bottom: 44 };
  const titleOf = (column) => (column.unit ? `${column.label}, ${column.unit}` : column.label);
  const textOf = (column, row) => `${fixed(column, column.values[row])}${column.unit === "%" ? " %" : column.unit && ` ${column.unit}`}`;
  const isGuess = (column, row) => device().columns.includes(column) && device().sources[row] === "interpolated";

  let focused = 0;
  function drawFront(found) {
    const svg = $("front");
    const width = Math.max(280, $("plot").clientWidth);
    const height = Math.round(Math.min(430, Math.max(290, width * 0.5)));
    const [x, y] = [costNamed(state.cost), vertical()];
    const across = (value) => MARGIN.left + share(x.scale, value) * (width - MARGIN.left - MARGIN.right);
    const down = (value) => height - MARGIN.bottom - share(y.scale, value) * (height - MARGIN.top - MARGIN.bottom);
    const place = (row) => [across(x.values[row] / x.factor), down(y.values[row] / y.factor)];
    const floor = height - MARGIN.bottom;
    const shown = data.names.map((_, row) => row).filter((row) => x.values[row] !== null && y.values[row] !== null);
    shown.sort((a, b) => x.values[a] - x.values[b] || a - b);

    const grid = make("g", { class: "grid" });
    for (const [value, text] of y.scale.ticks) {
      grid.append(make("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: down(value), y2: down(value) }));
      grid.append(make("text", { x: MARGIN.left - 7, y: down(value) + 4, "text-anchor": "end" }, text));
    }
    let edge = -Infinity;
    for (const [value, text] of x.scale.ticks) {
      const half = text.length * 3.2;
      if (across(value) - half < edge || across(value) + half > width) continue;
      edge = across(value) + half + 6;
      grid.append(make("text", { x: across(value), y: floor + 17, "text-anchor": "middle" }, text));
    }
    const parts = [
      grid,
      make("text", { class: "axis", x: MARGIN.left, y: 14 }, titleOf(y)),
      make("text", { class: "axis", x: width - MARGIN.right, y: height - 6, "text-anchor": "end" }, titleOf(x)),
      frontLine(shown, x, y, place),
    ];
    const limit = state.limits.get(state.cost);
    if (limit !== undefined) {
      const at = Math.min(width - MARGIN.right, Math.max(MARGIN.left, across(Math.max(limit, x.scale.low))));
      const beyond = { x: at, y: MARGIN.top - 8, width: width - MARGIN.right - at, height: floor - MARGIN.top + 8 };
      parts.push(make("rect", { class: "beyond", ...beyond }));
      parts.push(make("line", { class: "edge", x1: at, x2: at, y1: MARGIN.top - 8, y2: floor }));
    }
    $("guess-note").hidden = !shown.some((row) => isGuess(x, row));
    const title = svg.querySelector("title");
    title.textContent = `${titleOf(y)} against ${titleOf(x)} of ${shown.length} sub-networks; arrow keys go through them`;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const radius = shown.length > 150 ? 3.5 : 5.5;
    if (!shown.includes(focused)) focused = shown[0];
    const points = shown.map((row) => pointOf(row, place(row), radius, found, shown, x));
    const chosen = points.filter((_, index) => shown[index] === found.pick);
    svg.replaceChildren(title, ...parts, ...points.filter((point) => !chosen.includes(point)), ...chosen);
    if (shown.includes(found.pick)) svg.append(nameOf(found.pick, place(found.pick), width));
  }

  /** The line through the sub-networks that none beats in what the two axes show. */
  function frontLine(shown, x, y, place) {
    let best = -Infinity;
    const corners = [];
    for (const row of shown) {
      if (y.values[row] <= best) continue;
      const tie = corners.length && x.values[corners.at(-1)] === x.values[row];
      if (tie) corners.pop();
      best = y.values[row];
      corners.push(row);
    }
    const path = corners.map(place).map(([left, top], index) => (index ? `H${left}V${top}` : `M${left} ${top}`));
    return make("path", { class: "front", d: path.join("") });
  }

  function pointOf(row, [left, top], radius, found, shown, x) {
    const kinds = { fits: found.fits.has(row), guess: isGuess(x, row), pick: row === found.pick, second: row === found.second };
    const classes = ["dot", ...Object.keys(kinds).filter((kind) => kinds[kind])].join(" ");
    const dot = make("circle", { class: classes, cx: left, cy: top, r: kinds.pick ? radius + 2.5 : radius });
    const target = make("circle", { cx: left, cy: top, r: 11, fill: "transparent" });
    const words = figuresOf(row).map(([term, value]) => `${term} ${value}`);
    const label = `${data.names[row]}: ${words.join(", ")}`;
    const attributes = { class: "point", role: "img", "aria-label": label, tabindex: row === focused ? 0 : -1, "data-name": data.names[row] };
    const point = make("g", attributes, target, dot);
    point.addEventListener("pointerenter", () => showTip(row, left, top));
    point.addEventListener("pointerleave", hideTip);
    point.addEventListener("click", () => showTip(row, left, top));
    point.addEventListener("focus", () => showTip(row, left, top));
    point.addEventListener("blur", hideTip);
    point.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      const next = shown[shown.indexOf(row) + step];
      if (event.key === "Escape") hideTip();
      if (step === undefined || next === undefined) return;
      event.preventDefault();
      focused = next;
      point.setAttribute("tabindex", -1);
      const other = [...$("front").querySelectorAll(".point")].find((each) => each.dataset.name === data.names[next]);
      other.setAttribute("tabindex", 0);
      other.focus();
    });
    return point;
  }

  function nameOf(row, [left, top], width) {
    const isRight = left > width - 90;
    const spot = { x: isRight ? left - 12 : left + 12, y: top < MARGIN.top + 16 ? top + 20 : top - 11 };
    return make("text", { class: "name", ...spot, "text-anchor": isRight ? "end" : "start", "pointer-events": "none" }, data.names[row]);
  }

  /** A sub-network's figures as terms and values: the quality that is shown and all costs. */
  function figuresOf(row, qualities = [quality()]) {
    const columns = data.hasQuality ? [...qualities, ...costs()] : costs();
    return columns
      .filter((column) => column.values[row] !== null)
      .map((column) => [column.label, textOf(column, row) + (isGuess(column, row) && column.name === "latency_ms" ? guessText() : "")]);
  }
  function guessText() {
    const error = device().fit_error;
    return ` interpolated${error === null ? "" : `, ± ${format(100 * error, 2)} %`}`;
  }

  function showTip(row, left, top) {
    const tip = $("tip");
    const rows = figuresOf(row).map(([term, value]) => make("div", {}, make("dt", {}, term), make("dd", {}, value)));
    tip.replaceChildren(make("strong", {}, data.names[row]), make("dl", {}, ...rows));
    tip.hidden = false;
    const room = $("plot").clientWidth;
    tip.style.left = `${Math.max(0, Math.min(left + 14, room - tip.offsetWidth))}px`;
    tip.style.top = `${top > tip.offsetHeight + 14 ? top - tip.offsetHeight - 14 : top + 16}px`;
  }
  const hideTip = () => { $("tip").hidden = true; };

  // ---- The answer --------------------------------------------------------------------------------------------------

  function showAnswer(found) {
    const answer = $("answer");
    const unknown = found.numLeftOut ? [make("p", { class: "note" }, `${found.numLeftOut} sub-networks lack a figure that is needed and are left out.`)] : [];
    if (found.pick === undefined) {
      answer.replaceChildren(make("p", { class: "pick-name", id: "pick" }, "Nothing fits."), make("p", { class: "others" }, nearest(found)), ...unknown);
      return;
    }
    const name = data.names[found.pick];
    const heading = make("p", { class: "pick-name" }, make("small", {}, data.hasQuality ? "Best that fits" : "Largest that fits"), make("span", { id: "pick" }, name));
    const qualities = data.qualities.filter((column) => column.main || column === quality());
    const figures = figuresOf(found.pick, qualities).map(([term, value]) => make("li", {}, `${term} `, make("b", {}, value)));
    answer.replaceChildren(
      heading,
      make("ul", { class: "figures" }, ...figures),
      runnerUp(found),
      commandLine("export-command", `poa export ${data.run} ${name}${device().export}`),
      commandLine("select-command", selectCommand()),
      ...unknown,
    );
  }

  function nearest(found) {
    const words = (limits) => limits.map(([column, value]) => `${column.label} of ${format(value / column.factor, 6)} ${column.unit}`);
    const alone = words(relaxations(found));
    if (alone.length) return `The nearest limit that lets something fit: ${alone.join(", or ")}.`;
    return found.usable.length ? `No single limit helps; these let something fit: ${words(jointly(found)).join(" and ")}.` : "";
  }

  function runnerUp({ pick, second: row }) {
    if (row === undefined) return make("p", { class: "others", id: "runner-up" }, "No other that fits is smaller or faster.");
    const [good, x] = [quality(), costNamed(state.cost)];
    const less = (column) => column.values[row] === null || column.values[pick] === null ? "" : relative(column, row, pick);
    const loss = (good.values[pick] - good.values[row]) / good.factor;
    const words = [data.hasQuality && `${format(loss, 2)}${good.unit === "%" ? " points" : ""} less ${good.label}`, less(x)].filter(Boolean);
    return make("p", { class: "others" }, "Runner-up: ", make("b", { id: "runner-up" }, data.names[row]), `, ${words.join(", ")}`);
  }
  function relative(column, row, pick) {
    const change = Math.round(100 * (column.values[row] / column.values[pick] - 1));
    return change ? `${Math.abs(change)} % ${change < 0 ? "less" : "more"} ${column.label}` : `as much ${column.label}`;
  }

  function selectCommand() {
    const limits = [...state.limits].map(([name, limit]) => [costNamed(name), limit]).filter(([column]) => column);
    const options = limits.map(([column, limit]) => ` ${column.limit} ${limit}${column.unit}`).join("");
    return `poa select ${data.run} --quality ${data.hasQuality ? quality().name : "params"}${options}${data.tables}${device().options}`;
  }

  function commandLine(id, text) {
    const words = text.split(" ").flatMap((word) => [" ", make("span", {}, word)]).slice(1);
    const code = make("code", { id }, ...words);
    const button = make("button", { type: "button", "aria-label": `Copy: ${text}` }, "Copy");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        window.getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
    });
    return make("p", { class: "command" }, code, button);
  }

  // ---- Controls ----------------------------------------------------------------------------------------------------

  function fill(select, labels, chosen) {
    select.replaceChildren(...labels.map(([value, text]) => make("option", { value }, text)));
    select.value = chosen;
  }

  function showControls() {
    fill($("quality"), data.qualities.map((column, place) => [place, column.label]), state.quality);
    fill($("cost"), costs().map((column) => [column.name, column.label]), state.cost);
    fill($("device"), data.devices.map((each, place) => [place, each.label]), state.device);
    $("device-label").hidden = !data.devices.length;
    $("quality-label").hidden = !data.hasQuality;
  }

  function showLimits() {
    const column = costNamed(state.cost);
    const limit = state.limits.get(state.cost);
    $("limit-label").textContent = limit === undefined ? `No limit of ${column.label}` : `${capital(column.label)} at most`;
    $("limit-unit").textContent = column.unit;
    if (document.activeElement !== $("limit")) $("limit").value = limit ?? "";
    const part = limit === undefined ? 1 : limit > 0 || !column.scale.log ? share(column.scale, limit) : 0;
    if (document.activeElement !== $("slider")) $("slider").value = Math.round(1000 * Math.min(1, Math.max(0, part)));
    $("slider").setAttribute("aria-valuetext", limit === undefined ? "no limit" : `${column.label} at most ${limit} ${column.unit}`);
    $("unlimited").hidden = limit === undefined;
    const others = [...state.limits].filter(([name]) => name !== state.cost && costNamed(name));
    $("limits").replaceChildren(...others.map(([name, value]) => {
      const other = costNamed(name);
      const button = make("button", { type: "button", "aria-label": `Remove the limit of ${other.label}` }, `${other.label} ≤ ${value} ${other.unit} ×`);
      button.addEventListener("click", () => setLimit(name, undefined));
      return make("li", {}, button);
    }));
  }

  function setLimit(name, value) {
    if (value === undefined) state.limits.delete(name);
    else state.limits.set(name, value);
    refresh();
  }

  function refresh() {
    const found = choose();
    hideTip();
    showLimits();
    drawFront(found);
    showAnswer(found);
  }

  function change(action) {
    action();
    if (!costNamed(state.cost)) state.cost = "num_params";
    showControls();
    refresh();
  }

  $("quality").addEventListener("change", (event) => change(() => { state.quality = Number(event.target.value); }));
  $("cost").addEventListener("change", (event) => change(() => { state.cost = event.target.value; }));
  $("device").addEventListener("change", (event) => change(() => { state.device = Number(event.target.value); }));
  $("slider").addEventListener("input", (event) => {
    const part = Number(event.target.value) / 1000;
    setLimit(state.cost, part === 1 ? undefined : rounded(valueAt(costNamed(state.cost).scale, part)));
  });
  $("limit").addEventListener("input", (event) => {
    const value = event.target.valueAsNumber;
    setLimit(state.cost, Number.isFinite(value) ? value : undefined);
  });
  $("unlimited").addEventListener("click", () => setLimit(state.cost, undefined));

  for (const id of ["controls", "budget-row", "answer"]) $(id).hidden = false;
  state.cost = costNamed("latency_ms") ? "latency_ms" : "num_params";
  const first = costNamed(state.cost);
  state.limits.set(state.cost, rounded(valueAt(first.scale, 0.6)));
  change(() => {});
  let width = $("plot").clientWidth;
  new ResizeObserver(() => {
    if ($("plot").clientWidth === width) return;
    width = $("plot").clientWidth;
    drawFront(choose());
  }).observe($("plot"));

  // ---- The curves: their values under the pointer ------------------------------------------------------------------

  /** The place in a rising list that is nearest to a value. */
  function nearestIn(list, value) {
    let [low, high] = [0, list.length - 1];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (list[middle] < value) low = middle;
      else high = middle;
    }
    return value - list[low] <= list[high] - value ? low : high;
  }

  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const chart = data.charts[Number(figure.dataset.chart)];
    const svg = figure.querySelector("svg");
    const cursor = svg.querySelector(".cursor");
    const values = [...figure.querySelectorAll(".legend b")];
    const [left, right, width] = ["left", "right", "width"].map((name) => Number(svg.dataset[name]));
    const longest = chart.curves.reduce((a, b) => (b.x.length > a.x.length ? b : a));
    let at = longest.x.length - 1;
    const show = (place, isOn) => {
      at = place;
      const step = longest.x[place];
      chart.curves.forEach((curve, number) => { values[number].textContent = format(curve.y[nearestIn(curve.x, step)]); });
      values.at(-1).textContent = format(step, 9);
      const x = left + ((step - chart.low) / (chart.high - chart.low)) * (width - left - right);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.setAttribute("visibility", isOn ? "visible" : "hidden");
    };
    const point = (event) => {
      const box = svg.getBoundingClientRect();
      const part = (((event.clientX - box.left) / box.width) * width - left) / (width - left - right);
      show(nearestIn(longest.x, chart.low + part * (chart.high - chart.low)), true);
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    for (const end of ["pointerleave", "blur"]) svg.addEventListener(end, () => show(longest.x.length - 1, false));
    svg.addEventListener("focus", () => show(at, true));
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      show(Math.max(0, Math.min(longest.x.length - 1, at + step)), true);
    });
  }
})();
