// The form: what is asked for, what the model offers, and the errors of the API at their fields.

import { Combobox } from "./combobox.js";
import { $, h, memory, plural } from "./dom.js";
import { icon } from "./icons.js";
import { choices, className, has, loadExamples, modelOf, ofKind, paintExample, referenceTo } from "./models.js";

const SAMPLERS = {
  ddpm: "DDPM: fresh noise at every step, as in training. Good from about 100 steps.",
  ddim: "DDIM: no fresh noise unless eta says so. Good from about 25 steps.",
  dpmpp_2m: "DPM-Solver++(2M): uses the step before as well. Good in few steps.",
};
const SEEDS = 2 ** 32;
const RANDOM = "";
const MAX_PREVIEWS = 25;

const simple = {
  num_images: "num",
  eta: "eta",
  respacing: "respacing",
  guidance_every: "guidance-every",
  upsample: "upsample",
  upsample_respacing: "upsample-respacing",
  priority: "priority",
  deadline_s: "deadline",
  format: "format",
};

export class Form {
  constructor() {
    this.classes = new Combobox($("class"), $("class-list"), (thumb, option) => this.paint(thumb, option), (chosen) => {
      this.paint($("class-thumb"), chosen ?? {});
    });
    $("model").addEventListener("change", () => this.show());
    $("scale-range").addEventListener("input", () => this.setScale($("scale-range").value));
    $("scale").addEventListener("input", () => this.setScale($("scale").value));
    $("sampler").addEventListener("change", () => this.showSampler());
    $("seed-lock").addEventListener("click", () => {
      this.lock(!this.locked);
      this.keep();
    });
    $("seed-dice").addEventListener("click", () => {
      this.roll();
      this.keep();
    });
    $("seed").addEventListener("input", () => this.lock(true));
    $("form").addEventListener("input", (event) => this.clearErrors(event.target));
    $("form").addEventListener("change", () => this.keep());
    $("seed-dice").replaceChildren(icon("dice"));
    this.lock(false);
    this.roll();
  }

  /** Offer what the server has. */
  fill() {
    const usable = ofKind("diffusion");
    $("model").replaceChildren(...usable.map((model) => h("option", { value: model.name }, model.name)));
    $("sampler").replaceChildren(...choices("sampler").map((name) => h("option", { value: name }, name)));
    const upsamplers = ofKind("upsampler").map((model) =>
      h("option", { value: model.name }, `${model.name} (${model.low_res_size} to ${model.image_size})`),
    );
    $("upsample").replaceChildren(h("option", { value: "" }, "none"), ...upsamplers);
    for (const field of $("advanced").querySelectorAll("[data-field]")) field.hidden = !has(field.dataset.field);
    const kept = memory.get("form");
    if (kept && modelOf(kept.model ?? "")) this.load(kept, kept.locked);
    else if (usable.length) this.show();
  }

  get model() {
    return modelOf($("model").value);
  }

  /** Show the chosen model: its classes, defaults and limits. */
  async show({ label } = {}) {
    const { model } = this;
    if (!model) return;
    const { defaults } = model;
    const facts = [
      `${model.image_size}×${model.image_size}`,
      model.num_classes ? plural(model.num_classes, "class").replace("classs", "classes") : "no classes",
      model.guidance ? "with a classifier" : "no classifier",
      model.workers ? plural(model.workers, "worker") : "no worker takes its jobs now",
    ];
    $("model-hint").textContent = facts.join(" · ");
    $("steps").value = defaults.steps;
    $("steps").max = model.limits.max_steps;
    $("steps-list").replaceChildren(
      ...[10, 25, 50, 100, 250].filter((n) => n <= model.limits.max_steps).map((n) => h("option", { value: n })),
    );
    $("sampler").value = defaults.sampler;
    $("num").max = model.limits.max_images;
    $("eta").placeholder = defaults.eta;
    $("interval-high").placeholder = model.limits.max_steps - 1;
    for (const id of ["scale", "scale-range"]) $(id).disabled = !model.guidance;
    this.setScale(model.guidance ? defaults.guidance_scale : 0);
    this.showSampler();
    const kept = label ?? this.classes.value;
    const fill = () => this.classes.setOptions(this.classOptions(model), kept);
    fill();
    await loadExamples(model);
    if (this.model === model) this.paint($("class-thumb"), this.classes.chosen ?? {});
  }

  classOptions(model) {
    const none = { value: RANDOM, label: model.class_conditional ? "random" : "none" };
    const known = Array.from({ length: model.num_classes ?? 0 }, (_, label) => ({
      value: label,
      label: className(model, label),
      hint: model.num_classes > 20 ? String(label) : undefined,
    }));
    return [none, ...known];
  }

  paint(thumb, option) {
    if (this.model) paintExample(thumb, this.model, option.value);
  }

  showSampler() {
    $("sampler-hint").textContent = SAMPLERS[$("sampler").value] ?? "";
  }

  setScale(value) {
    const scale = Number(value === "" ? this.model?.defaults.guidance_scale : value); // what is left out is the default
    if ($("scale").value !== String(value)) $("scale").value = value;
    $("scale-range").value = scale;
    $("scale-hint").textContent = this.model?.guidance ? tradeOf(scale) : "This model has no classifier to guide it.";
  }

  lock(locked) {
    this.locked = locked;
    const button = $("seed-lock");
    button.setAttribute("aria-pressed", String(locked));
    button.setAttribute("aria-label", "Keep this seed");
    button.title = locked ? "This seed is kept; press for a new one each time" : "A new seed each time; press to keep this one";
    button.replaceChildren(icon(locked ? "locked" : "unlocked"));
  }

  roll() {
    $("seed").value = Math.floor(crypto.getRandomValues(new Uint32Array(1))[0] % SEEDS);
    this.clearErrors($("seed"));
  }

  /** The body of the request, with a new seed unless it is locked; null if a field cannot be sent. */
  read() {
    this.clearErrors();
    if (!this.locked) this.roll();
    const { model } = this;
    const body = { model: $("model").value };
    if (this.classes.value !== RANDOM) body.class_label = this.classes.value;
    for (const [field, id] of Object.entries(simple)) if (has(field)) this.put(body, field, id);
    if (!body.respacing) this.put(body, "steps", "steps");
    if (model?.guidance) this.put(body, "guidance_scale", "scale");
    body.sampler = $("sampler").value;
    if ($("clip").value) body.clip_denoised = $("clip").value === "true";
    this.putInterval(body);
    this.putSeed(body);
    body.preview_every = Math.max(1, Math.round((Number(body.steps) || model?.defaults.steps || 1) / MAX_PREVIEWS));
    this.keep();
    return this.invalid ? null : body;
  }

  put(body, field, id) {
    const input = $(id);
    if (input.validity.badInput) this.refuse(field, "must be a number");
    else if (input.value.trim() !== "") body[field] = input.type === "number" ? Number(input.value) : input.value.trim();
  }

  putInterval(body) {
    const ends = ["interval-low", "interval-high"].map((id) => $(id));
    if (ends.every((input) => input.value === "" && !input.validity.badInput)) return;
    if (ends.some((input) => input.validity.badInput)) this.refuse("guidance_interval", "must be two numbers");
    else body.guidance_interval = ends.map((input) => Number(input.value || input.placeholder));
  }

  putSeed(body) {
    const typed = $("seed").value.trim();
    const exact = /^\d+$/.test(typed) && Number.isSafeInteger(Number(typed));
    if (exact) body.seed = Number(typed);
    else this.refuse("seed", `must be a whole number from 0 to ${Number.MAX_SAFE_INTEGER}`);
  }

  /** What the form says, to be loaded again. */
  state() {
    const body = { model: $("model").value, locked: this.locked, seed: $("seed").value };
    for (const [field, id] of Object.entries(simple)) body[field] = $(id).value;
    const more = { steps: "steps", guidance_scale: "scale", sampler: "sampler", clip_denoised: "clip" };
    for (const [field, id] of Object.entries(more)) body[field] = $(id).value;
    const interval = [$("interval-low").value, $("interval-high").value];
    return { ...body, class_label: this.classes.value, guidance_interval: interval };
  }

  /** Set all fields from a request's body; what it leaves out gets the model's default. */
  load(body, locked) {
    this.clearErrors();
    const [name, version] = body.model.split("@");
    const reference = referenceTo(name, version);
    if (![...$("model").options].some((option) => option.value === reference)) {
      $("model").append(h("option", { value: reference }, reference));
    }
    $("model").value = reference;
    this.show({ label: body.class_label ?? RANDOM });
    for (const [field, id] of Object.entries(simple)) $(id).value = body[field] ?? (field in DEFAULTS ? DEFAULTS[field] : "");
    if (body.steps) $("steps").value = body.steps;
    if (body.sampler) $("sampler").value = body.sampler;
    if ((body.guidance_scale ?? "") !== "") this.setScale(body.guidance_scale);
    $("clip").value = String(body.clip_denoised ?? "");
    const [low, high] = body.guidance_interval ?? ["", ""];
    $("interval-low").value = low;
    $("interval-high").value = high;
    if ((body.seed ?? "") !== "") $("seed").value = body.seed;
    this.lock(Boolean(locked));
    this.showSampler();
    this.keep();
  }

  /** Remember what the form says for the next visit. */
  keep() {
    memory.set("form", this.state());
  }

  /** Show an API error: each message at its field, the rest above the form. */
  fail(error) {
    const loose = [];
    for (const { field, message } of error.errors ?? []) {
      if (!this.refuse(field, message)) loose.push(field ? `${field}: ${message}` : message);
    }
    if (!error.errors?.length) loose.push(error.message);
    if (error.retryAfter) loose.push(`Try again in ${error.retryAfter} s.`);
    $("form-error").textContent = loose.join(" ");
    $("form-error").hidden = loose.length === 0;
    const first = $("form").querySelector("[aria-invalid=true]");
    if (first?.closest("details")) first.closest("details").open = true;
    first?.focus();
  }

  refuse(field, message) {
    const place = $("form").querySelector(`[data-field="${CSS.escape(field.split(".")[0])}"]`);
    if (!place) return false;
    this.invalid = true;
    const id = `${place.dataset.field}-error`;
    const line = $(id) ?? h("p", { id, class: "error", "aria-live": "polite" });
    line.textContent = line.textContent ? `${line.textContent}; ${message}` : message;
    place.append(line);
    for (const input of place.querySelectorAll("input, select")) {
      input.setAttribute("aria-invalid", "true");
      input.setAttribute("aria-errormessage", id);
    }
    return true;
  }

  /** Take errors away: those of one input's field, or all. */
  clearErrors(input) {
    const places = input ? [input.closest("[data-field]")] : $("form").querySelectorAll("[data-field]");
    for (const place of places) {
      for (const line of place?.querySelectorAll(".error") ?? []) line.remove();
      for (const marked of place?.querySelectorAll("[aria-invalid]") ?? []) {
        marked.removeAttribute("aria-invalid");
        marked.removeAttribute("aria-errormessage");
      }
    }
    if (input) return;
    this.invalid = false;
    $("form-error").hidden = true;
  }
}

const DEFAULTS = { num_images: 1, priority: "default", format: "png" };

/** What a guidance scale trades, in words. */
function tradeOf(scale) {
  if (scale < 0) return "Away from the class: the classifier pushes the other way.";
  if (scale === 0) return "Classifier off: the widest variety, and the class as far as the model itself knows it.";
  if (scale < 2) return "A light pull: varied, now and then unclear.";
  if (scale <= 5) return "A clear class with some variety left.";
  if (scale <= 10) return "A strong pull: typical examples, less variety.";
  return "Very strong: fidelity at the cost of variety; pictures may look overdone.";
}
