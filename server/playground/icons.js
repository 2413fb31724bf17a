// Icons, drawn here so that they look the same with every font.

const SHAPES = {
  locked: ["M6 11h12v9H6z", "M8.5 11V8a3.5 3.5 0 0 1 7 0v3"],
  unlocked: ["M6 11h12v9H6z", "M8.5 11V7a3.5 3.5 0 0 1 6.8-1"],
  dice: ["M5 5h14v14H5z", "M9 9v.5M15 9v.5M12 12v.5M9 15v.5M15 15v.5"],
};

/** An icon by its name. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "glyph");
  svg.setAttribute("aria-hidden", "true");
  for (const shape of SHAPES[name]) {
    const path = document.createElementNS(svg.namespaceURI, "path");
    path.setAttribute("d", shape);
    svg.append(path);
  }
  return svg;
}
