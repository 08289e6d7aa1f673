"use strict";
const specs = JSON.parse(document.getElementById("charts").textContent);
let views = [];

/* The charts' colours are the page's, light or dark. */
function theme() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const colours = (name) => colour(name).split(/\s*,\s*/);
  const ink = colour("--ink"), soft = colour("--soft");
  return {
    background: "transparent",
    font: getComputedStyle(document.body).fontFamily,
    padding: 2,
    view: { stroke: null },
    axis: {
      labelColor: soft, titleColor: soft, titleFontWeight: "normal", titlePadding: 8,
      gridColor: colour("--grid"), domainColor: colour("--line"), tickColor: colour("--line"),
      labelFontSize: 11.5, titleFontSize: 12,
    },
    axisBand: { grid: false },
    legend: {
      labelColor: ink, titleColor: soft, labelFontSize: 11.5, symbolStrokeColor: soft,
      labelLimit: 220,
    },
    text: { color: ink, fontSize: 11.5 },
    rule: { color: soft },
    line: { strokeWidth: 2 },
    range: {
      category: colours("--series"),
      ordinal: { scheme: colours("--depth") },
      heatmap: { scheme: colours("--heat") },
    },
  };
}

/* A row for each value there is. */
function formatTooltip(value, sanitize) {
  if (typeof value !== "object") return sanitize(value);
  const rows = Object.entries(value).filter(([, each]) => each !== "NaN");
  return "<table>" + rows.map(([name, each]) =>
    `<tr><td>${sanitize(name)}</td><td>${sanitize(each)}</td></tr>`).join("") + "</table>";
}

async function draw() {
  views.forEach((view) => view.finalize());
  const options = {
    mode: "vega-lite", renderer: "svg", actions: false, config: theme(), tooltip: { formatTooltip },
  };
  views = await Promise.all(
    Object.entries(specs).map(([id, spec]) => vegaEmbed(document.getElementById(id), spec, options)));
  document.documentElement.dataset.drawn = Math.round(performance.now()); /* ms after the page was asked for */
}

let drawing = draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawing = drawing.then(draw); });
