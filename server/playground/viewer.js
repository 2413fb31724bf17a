// One picture, large, with its recipe and what can be done with it.

import { $, copy, h, save, toast } from "./dom.js";
import { placeOf, urlOf } from "./gallery.js";
import { asCurl, asPython, fileName } from "./recipe.js";
import { npz } from "./runner.js";

const NAMES = {
  model: "Model",
  class_label: "Class",
  respacing: "Respacing",
  sampler: "Sampler",
  eta: "Eta",
  guidance_scale: "Guidance scale",
  guidance_interval: "Guided timesteps",
  guidance_every: "Classifier every",
  clip_denoised: "Clip predicted x₀",
  seed: "Seed",
  upsample: "Upsampler",
  upsample_respacing: "Its respacing",
};

function told(name, value, picture) {
  if (name === "class_label") return picture.name ? `${picture.name} (${value})` : String(value);
  if (name === "guidance_interval") return value.join(" to ");
  if (typeof value === "boolean") return value ? "yes" : "no";
  return String(value);
}

/** Open a picture of a set; `act` are again(job, picture), scales(...) and steps(...). */
export function openViewer(set, job, picture, act) {
  const dialog = $("viewer");
  const all = set.jobs.flatMap((other) =>
    [...other.pictures].sort((a, b) => a.index - b.index).map((found) => [other, found]),
  );
  let at = all.findIndex(([, found]) => found === picture);

  const show = () => {
    const [owner, shown] = all[at];
    const close = (run) => () => {
      dialog.close();
      run(owner, shown);
    };
    const button = (text, click, kind = "") => h("button", { type: "button", class: kind, on: { click } }, text);
    const place = placeOf(set, owner);
    const recipe = Object.entries(shown.recipe).flatMap(([name, value]) => [
      h("dt", {}, NAMES[name] ?? name),
      h("dd", {}, told(name, value, shown)),
    ]);
    const { guidance } = act.modelOf(shown) ?? {};
    const title = `${shown.name ?? "Picture"}${place ? `, ${place}` : ""}`;
    const shut = { type: "button", "aria-label": "Close", title: "Close", on: { click: () => dialog.close() } };
    dialog.replaceChildren(
      h("div", { class: "shut" }, h("button", shut, "×")),
      h("div", { class: "big" }, h("img", { src: urlOf(shown), alt: `${title}, seed ${shown.seed}` })),
      h(
        "div",
        { class: "about" },
        h("h2", { id: "viewer-title" }, title),
        h("dl", { class: "recipe" }, ...recipe, h("dt", {}, "Steps"), h("dd", {}, String(shown.steps))),
        h(
          "div",
          { class: "actions" },
          button("Again with this seed", close(act.again), "primary"),
          guidance ? button("Vary the scale", close(act.scales)) : null,
          button("Walk the steps", close(act.steps)),
        ),
        h(
          "div",
          { class: "actions small" },
          button("Download PNG", () => save(shown.file, fileName(shown, "png"))),
          button("Download npz", () => download(owner, shown)),
          button("Copy as curl", () => copy(asCurl(shown), "the curl commands")),
          button("Copy as Python", () => copy(asPython(shown), "the Python lines")),
        ),
        h(
          "div",
          { class: "turn" },
          h("button", { type: "button", class: "quiet", "aria-label": "Previous picture", disabled: at === 0, on: { click: () => go(-1) } }, "←"),
          h("span", { class: "hint" }, `${at + 1} of ${all.length}`),
          h("button", { type: "button", class: "quiet", "aria-label": "Next picture", disabled: at === all.length - 1, on: { click: () => go(1) } }, "→"),
        ),
      ),
    );
  };
  const go = (by) => {
    const next = at + by;
    if (next < 0 || next >= all.length) return;
    at = next;
    show();
    const [back, on] = dialog.querySelectorAll(".turn button");
    const [wanted, other] = by < 0 ? [back, on] : [on, back];
    (wanted.disabled ? other : wanted).focus();
  };
  dialog.onkeydown = (event) => {
    if (event.key === "ArrowLeft") go(-1);
    if (event.key === "ArrowRight") go(1);
  };
  dialog.onclick = (event) => event.target === dialog && dialog.close();
  show();
  dialog.showModal();
}

async function download(job, picture) {
  try {
    save(await npz(job), fileName(picture, "npz"));
  } catch (error) {
    toast(error.status === 404 ? "The server no longer keeps this job; its PNG is kept here." : error.message);
  }
}
