// The theme and the charts.
"use strict";
(() => {
  const colors = JSON.parse(document.getElementById("colors").textContent);
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = document.querySelector("button.theme");
  const charts = [...document.querySelectorAll(".plot")];
  let printing = false;

  const theme = () => (printing ? "light" : root.dataset.theme || (system.matches ? "dark" : "light"));

  // Figures come in light colours; the dark ones take their places. Only what is a colour is looked at.
  function colored(value, name, key) {
    if (Array.isArray(value)) {
      if (key === "colorscale") return colors[name].scale;
      return value.map((each) => colored(each, name, key));
    }
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([inner, each]) => [inner, colored(each, name, inner)]));
    const place = /color$/i.test(key) ? colors.light.series.indexOf(value) : -1;
    return place < 0 ? value : colors[name].series[place];
  }

  function draw(chart) {
    const figure = JSON.parse(document.getElementById(`${chart.id}-data`).textContent);
    const { text, muted, grid, surface, accent } = colors[theme()];
    const { data, layout } = colored(figure, theme(), "");
    const select = document.querySelector(`select[data-chart="${chart.id}"]`);
    if (select) {
      const each = data.length / select.options.length;
      data.forEach((trace, number) => { trace.visible = Math.floor(number / each) === Number(select.value); });
    }
    const narrow = chart.clientWidth < 500;
    layout.font = { family: getComputedStyle(root).getPropertyValue("--font"), size: narrow ? 11 : 13, color: muted };
    layout.hoverlabel = { bgcolor: surface, bordercolor: grid, font: { color: text } };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: accent };
    for (const axis of ["xaxis", "yaxis"]) {
      if (layout[axis].title) layout[axis].title.font = { size: narrow ? 11 : 13 };
      layout[axis] = { ...layout[axis], gridcolor: grid, linecolor: grid, zerolinecolor: grid, tickcolor: grid };
    }
    for (const trace of data)
      if (trace.error_x) trace.error_x.color = text;
    if (printing) Object.assign(layout, { width: 660, autosize: false });
    if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false; // a finger scrolls the page
    Plotly.react(chart, data, layout, {
      responsive: !printing,
      displaylogo: false,
      displayModeBar: printing || narrow ? false : "hover",
      modeBarButtonsToRemove: ["lasso2d", "select2d"],
    });
  }

  function drawAll() {
    button.textContent = theme() === "dark" ? "Light theme" : "Dark theme";
    charts.forEach(draw);
  }

  button.addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch (error) { /* as above */ }
    drawAll();
  });
  system.addEventListener("change", drawAll);
  for (const select of document.querySelectorAll("select[data-chart]"))
    select.addEventListener("change", () => draw(document.getElementById(select.dataset.chart)));
  addEventListener("beforeprint", () => { printing = true; drawAll(); });
  addEventListener("afterprint", () => { printing = false; drawAll(); });
  // A chart in what is folded has no width before it is opened.
  for (const folded of document.querySelectorAll("details.folded"))
    folded.addEventListener("toggle", () => folded.querySelectorAll(".plot").forEach(draw));
  drawAll();
})();
