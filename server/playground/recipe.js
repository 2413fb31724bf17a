// Recipes: the request that makes a picture again, as JSON, curl and Python.

import { base, hasKey } from "./api.js";

/** The whole recipe of one picture of a job, every default spelt out. */
export function recipeOf(job, image) {
  const [first, second] = job.stages;
  const { model, version, steps, ...how } = first;
  const recipe = { model: version ? `${model}@${version}` : model, class_label: image.class_label, ...how, seed: image.seed };
  if (second) {
    recipe.upsample = second.version ? `${second.model}@${second.version}` : second.model;
    recipe.upsample_respacing = second.respacing;
  }
  return Object.fromEntries(Object.entries(recipe).filter(([, value]) => value !== null));
}

/** What a picture's file is called. */
export const fileName = (picture, end) => `${picture.name ?? "picture"}-${picture.seed}.${end}`.replaceAll(/[^\w.-]+/g, "-");

const quote = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** Shell lines that make the picture and save it. */
export function asCurl(picture) {
  const server = base.replace(/\/$/, "");
  const key = hasKey() ? [`-H "Authorization: Bearer $GUIDED_API_KEY"`] : [];
  const post = [
    `curl -sSf -o /dev/null -w '%header{location}' -X POST ${server}/generate`,
    ...key,
    `-H 'Content-Type: application/json' -H 'Prefer: wait=120'`,
    `-d ${quote(JSON.stringify(picture.recipe))}`,
  ];
  const load = [
    "curl -sSf --retry 1000 --retry-delay 1 --retry-all-errors", // until it is made, if that takes more than the wait
    ...key,
    `-o ${fileName(picture, "png")} "${server}\${job:?the server refused}/images/0?format=png"`,
  ];
  return [`job=$(${post.join(" \\\n  ")})`, load.join(" \\\n  ")].join("\n");
}

function python(value) {
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "boolean") return value ? "True" : "False";
  return JSON.stringify(value);
}

/** The same with the Python client. */
export function asPython(picture) {
  const options = Object.entries(picture.recipe).map(([name, value]) => `        ${name}=${python(value)},`);
  const server = JSON.stringify(base.replace(/\/$/, ""));
  return [
    "from pathlib import Path",
    "from clients import Client",
    "",
    `with Client(${server}) as client:`,
    "    job = client.generate(",
    ...options,
    "    )",
    `    Path(${JSON.stringify(fileName(picture, "png"))}).write_bytes(client.image(client.wait(job), 0, "png"))`,
  ].join("\n");
}
