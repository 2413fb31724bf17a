// The models, what a request may say (from the OpenAPI description), and an example of each class.

import { blob, get } from "./api.js";

export const models = new Map();
let schema = {};
const sheets = new Map();

/** Read both from the server. */
export async function loadModels() {
  const [list, api] = await Promise.all([get("models"), get("openapi.json")]);
  models.clear();
  for (const model of list.models) models.set(model.name, model);
  schema = api.components.schemas.GenerateRequest.properties;
}

export const ofKind = (kind) => [...models.values()].filter((model) => model.kind === kind);

/** A model by `name` or `name@version`. */
export const modelOf = (reference) => models.get(reference.split("@")[0]);

/** What stands for a version of a model: the bare name if it is the newest. */
export const referenceTo = (name, version) =>
  !version || models.get(name)?.version === version ? name : `${name}@${version}`;

export const has = (field) => field in schema;

/** The values a field may have. */
export function choices(field) {
  const kinds = [schema[field] ?? {}, ...(schema[field]?.anyOf ?? [])];
  return kinds.flatMap((kind) => kind.enum ?? (kind.const === undefined ? [] : [kind.const]));
}

/** Load a model's examples, if it has any. */
export async function loadExamples(model) {
  if (!model.examples || sheets.has(model.name)) return;
  try {
    sheets.set(model.name, URL.createObjectURL(await blob(model.examples)));
  } catch {
    // Names alone do, too.
  }
}

export const hasExamples = (model) => sheets.has(model.name);

/** Show a class's example as an element's background. */
export function paintExample(element, model, label) {
  const sheet = sheets.get(model.name);
  const known = sheet && Number.isInteger(label);
  element.classList.toggle("empty", !known);
  element.style.backgroundImage = known ? `url(${sheet})` : "";
  if (!known) return;
  const columns = Math.ceil(Math.sqrt(model.num_classes));
  const rows = Math.ceil(model.num_classes / columns);
  const at = (place, count) => (count > 1 ? `${(place / (count - 1)) * 100}%` : "0");
  element.style.backgroundSize = `${columns * 100}% ${rows * 100}%`;
  element.style.backgroundPosition = `${at(label % columns, columns)} ${at(Math.floor(label / columns), rows)}`;
}

/** A class's name, or its number. */
export const className = (model, label) => model?.class_names?.[label] ?? `class ${label}`;
