"use strict";
(() => {
  const { templates, figures } = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const options = { displaylogo: false, responsive: true };

  const draw = (theme) => {
    figures.forEach(({ data, layout }, number) => {
      // The page's own paper shows through.
      const clear = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
      const themed = { ...layout, ...clear, template: templates[theme] };
      Plotly.react(`figure-${number}`, data, themed, options);
    });
  };
  const follow = () => draw(dark.matches ? "dark" : "light");

  follow();
  dark.addEventListener("change", follow);
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((details) => { details.open = true; });
    draw("light");
  });
  window.addEventListener("afterprint", () => {
    opened.forEach((details) => { details.open = false; });
    follow();
  });
})();
