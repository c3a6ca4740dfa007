// SPDX-License-Identifier: Apache-2.0
"use strict";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["n", "steps", "seed", "guidance", "partial_images"];
const TEXTS = ["prompt", "negative_prompt", "size", "lora"];
let running = null;

function headers() {
  const token = $("token").value;
  return token ? { authorization: `Bearer ${token}` } : {};
}

function say(text, error = false) {
  $("status").textContent = text;
  $("status").className = error ? "error" : "";
}

async function describe() {
  const answer = await fetch("v1/models", { headers: headers() });
  if (!answer.ok) {
    say(answer.status === 401 ? "Enter the token." : `The server answers ${answer.status}.`, true);
    return;
  }
  const model = (await answer.json()).data[0];
  $("model").textContent = model.id;
  if (!model.sizes) {
    say("The ranks are loading.");
    setTimeout(describe, 2000);
    return;
  }
  $("size").replaceChildren(...model.sizes.map((size) => new Option(size, size)));
  $("lora").replaceChildren(new Option("none", ""), ...model.loras.map((name) => new Option(name, name)));
  $("steps").max = model.most_steps;
  $("steps").placeholder = model.steps;
  const closed = {
    prompt: !model.text, negative_prompt: !model.guidance, guidance: !model.guidance, partial_images: !model.previews,
    image: !model.edits, mask: !model.inpaints, strength: !model.edits, lora: !model.loras.length,
  };
  for (const [id, isClosed] of Object.entries(closed)) $(id).disabled = isClosed;
  say(`${model.gpus} ranks are ready.`);
}

function request() {
  const fields = { stream: true };
  for (const id of TEXTS) if (!$(id).disabled && $(id).value) fields[id] = $(id).value;
  for (const id of NUMBERS) if (!$(id).disabled && $(id).value !== "") fields[id] = $(id).valueAsNumber;
  const image = $("image").files[0];
  if (!image) {
    const body = JSON.stringify(fields);
    return { path: "v1/images/generations", body, headers: { "content-type": "application/json", ...headers() } };
  }
  const form = new FormData();
  if ($("strength").value !== "") fields.strength = $("strength").value;
  for (const [key, value] of Object.entries(fields)) form.append(key, value);
  form.append("image", image);
  if ($("mask").files[0]) form.append("mask", $("mask").files[0]);
  return { path: "v1/images/edits", body: form, headers: headers() };
}

function show(data, partial) {
  let figure = $("pictures").querySelector("figure.partial");
  if (!figure) {
    figure = document.createElement("figure");
    figure.append(document.createElement("img"), document.createElement("figcaption"));
    $("pictures").prepend(figure);
  }
  figure.className = partial ? "partial" : "";
  figure.firstChild.src = `data:image/${data.output_format};base64,${data.b64_json}`;
  figure.lastChild.textContent = `seed ${data.seed}${partial ? ", a preview" : ""}`;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const line = text.slice(0, end).split("\n").find((part) => part.startsWith("data: "));
      text = text.slice(end + 2);
      if (line) yield JSON.parse(line.slice(6));
    }
  }
}

async function draw(event) {
  event.preventDefault();
  running = new AbortController();
  $("draw").disabled = true;
  $("cancel").disabled = false;
  say("Drawing.");
  const began = performance.now();
  try {
    const { path, ...options } = request();
    const answer = await fetch(path, { method: "POST", signal: running.signal, ...options });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const data of events(answer.body)) {
      if (data.error) throw new Error(data.error.message);
      show(data, data.type.endsWith("partial_image"));
    }
    say(`Drawn in ${((performance.now() - began) / 1000).toFixed(2)} s.`);
  } catch (error) {
    document.querySelector("figure.partial")?.remove();
    say(error.name === "AbortError" ? "Cancelled." : error.message, error.name !== "AbortError");
  } finally {
    $("draw").disabled = false;
    $("cancel").disabled = true;
  }
}

$("form").addEventListener("submit", draw);
$("cancel").addEventListener("click", () => running?.abort());
$("token").addEventListener("change", describe);
describe();
