// A searchable list (the ARIA combobox pattern): type to narrow it, arrows to move, Enter to choose.

import { h } from "./dom.js";

export class Combobox {
  /** `paint(element, option)` draws an option's thumbnail; options are {value, label, hint}. */
  constructor(input, list, paint, onChange = () => {}) {
    Object.assign(this, { input, list, paint, onChange, options: [], shown: [], active: -1, chosen: null });
    input.addEventListener("focus", () => input.select());
    input.addEventListener("click", () => this.open());
    input.addEventListener("input", () => this.open(input.value));
    input.addEventListener("keydown", (event) => this.onKey(event));
    input.addEventListener("blur", () => this.close());
    list.addEventListener("mousedown", (event) => {
      event.preventDefault(); // keep the focus where it is
      const item = event.target.closest("[role=option]");
      if (item) this.choose(this.shown[Number(item.dataset.place)]);
    });
  }

  /** The chosen option's value, or what was typed if it is none of them. */
  get value() {
    this.settle();
    return this.chosen ? this.chosen.value : this.input.value.trim();
  }

  setOptions(options, value) {
    this.options = options;
    this.set(options.some((option) => option.value === value) ? value : options[0]?.value);
  }

  set(value) {
    this.chosen = this.options.find((option) => option.value === value) ?? null;
    this.input.value = this.chosen?.label ?? String(value ?? "");
    this.onChange(this.chosen);
  }

  choose(option) {
    this.set(option.value);
    this.close();
    this.input.dispatchEvent(new Event("change", { bubbles: true }));
  }

  open(search = "") {
    const wanted = search.trim().toLowerCase();
    const found = this.options.filter((option) => `${option.label} ${option.hint ?? ""}`.toLowerCase().includes(wanted));
    const begins = (option) => (option.label.toLowerCase().startsWith(wanted) ? 0 : 1);
    this.shown = wanted ? found.sort((a, b) => begins(a) - begins(b)) : found;
    this.list.replaceChildren(...this.shown.map((option, place) => this.item(option, place)));
    this.list.hidden = this.shown.length === 0;
    this.input.setAttribute("aria-expanded", String(!this.list.hidden));
    this.mark(wanted ? 0 : Math.max(0, this.shown.indexOf(this.chosen)));
  }

  close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
    this.settle();
  }

  /** Choose what was typed, unless what is chosen has that label: several options may. */
  settle() {
    const typed = this.input.value.trim().toLowerCase();
    if (this.chosen?.label.toLowerCase() === typed) return;
    this.chosen = this.options.find((option) => option.label.toLowerCase() === typed) ?? null; // the server refuses the unknown
    this.onChange(this.chosen);
  }

  item(option, place) {
    const thumb = h("span", { class: "thumb", "aria-hidden": "true" });
    this.paint(thumb, option);
    const hint = option.hint ? h("span", { class: "hint" }, option.hint) : null;
    return h(
      "li",
      { role: "option", id: `${this.list.id}-${place}`, "data-place": place, "aria-selected": "false" },
      thumb,
      h("span", {}, option.label),
      hint,
    );
  }

  mark(place) {
    this.active = Math.max(0, Math.min(place, this.shown.length - 1));
    for (const item of this.list.children) item.setAttribute("aria-selected", "false");
    const item = this.list.children[this.active];
    if (!item) return;
    item.setAttribute("aria-selected", "true");
    item.scrollIntoView({ block: "nearest" });
    this.input.setAttribute("aria-activedescendant", item.id);
  }

  onKey(event) {
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 };
    if (event.key in moves) {
      event.preventDefault();
      if (this.list.hidden) this.open();
      else this.mark(this.active + moves[event.key]);
    } else if (event.key === "Enter" && !this.list.hidden && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      this.choose(this.shown[this.active]);
    } else if (event.key === "Escape" && !this.list.hidden) {
      event.preventDefault();
      this.input.value = this.chosen?.label ?? this.input.value;
      this.close();
    }
  }
}
