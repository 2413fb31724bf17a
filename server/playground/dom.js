// Small helpers for building and finding elements, and for telling the user something.

export const $ = (id) => document.getElementById(id);

/** An element; `on` in the properties holds listeners, names with a dash become attributes. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "on") for (const [event, run] of Object.entries(value)) element.addEventListener(event, run);
    else if (name === "class") element.className = value;
    else if (name in element && !name.includes("-")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Tell screen readers what happened, without showing it. */
export function announce(text) {
  $("status-line").textContent = text;
}

const line = $("toast"); // kept: a dialog that holds it may replace what is in it
let hiding;

/** Tell everyone, at the bottom of the page, for some seconds; what is outside an open dialog is out of reach. */
export function toast(text) {
  (document.querySelector("dialog[open]") ?? document.body).append(line);
  line.hidden = false;
  line.textContent = text;
  clearTimeout(hiding);
  hiding = setTimeout(() => (line.hidden = true), 6000);
}

/** Seconds as people say them. */
export function duration(seconds) {
  if (seconds < 10) return `${Math.max(0.1, seconds).toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** Keep in localStorage what can be kept. */
export const memory = {
  get(name) {
    try {
      return JSON.parse(localStorage.getItem(`guided.${name}`));
    } catch {
      return null;
    }
  },
  set(name, value) {
    try {
      localStorage.setItem(`guided.${name}`, JSON.stringify(value));
    } catch {
      // It holds for this page only.
    }
  },
};

/** Hand a file to the user. */
export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Clipboards need a secure page; over plain HTTP from another machine this older way still works.
    const field = h("textarea", { value: text, class: "sr" });
    (document.querySelector("dialog[open]") ?? document.body).append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  toast(`Copied ${what}`);
}
