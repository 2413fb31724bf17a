// Not a module: it runs before the first paint, so that a chosen theme does not flash.
(() => {
  const KEY = "guided.theme";
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const read = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null;
    }
  };
  const current = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const chosen = read();
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => {
      const other = current() === "dark" ? "light" : "dark";
      button.setAttribute("aria-label", `Switch to ${other} colours`);
      button.title = `Switch to ${other} colours`;
    };
    button.addEventListener("click", () => {
      root.dataset.theme = current() === "dark" ? "light" : "dark";
      try {
        localStorage.setItem(KEY, root.dataset.theme);
      } catch {
        // It holds for this page only.
      }
      show();
    });
    dark.addEventListener("change", show);
    show();
  });
})();
