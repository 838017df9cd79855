"use strict";
const one = (id) => document.getElementById(id);
const files = one("files"), drop = one("drop"), results = one("results"), status = one("status");
let token = "", waiting = [], working = false;

const headers = () => (token ? { Authorization: `Bearer ${token}` } : {});
const say = (text, fault) => { status.textContent = text; status.className = fault ? "fault" : ""; };

// File names and reasons are untrusted: insert them as text, never as HTML.
function add(parent, kind, text, className) {
  const element = document.createElement(kind);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  parent.append(element);
  return element;
}

function picture(parent, source, caption, alt) {
  const figure = add(parent, "figure");
  if (source) Object.assign(add(figure, "img"), { src: source, alt });
  else add(figure, "span", undefined, "none");
  add(figure, "figcaption", caption);
}

function show(photo, about) {
  const card = document.createElement("article");
  card.className = "photo";
  const pictures = add(card, "div", undefined, "pictures");
  picture(pictures, photo.crop, photo.crop ? "model input" : "no image available", `retina of ${photo.file}`);
  if (photo.heatmap) picture(pictures, photo.heatmap, "heatmap", `heatmap over ${photo.file}`);
  const facts = add(card, "div", undefined, "facts");
  add(facts, "h2", photo.file);
  const decision = photo.decision || "not screened";
  add(facts, "p", decision, `decision ${photo.decision || ""}`);
  if (photo.reason) add(facts, "p", `${photo.status}: ${photo.reason}`);
  const table = add(add(facts, "table"), "tbody");
  const line = (name, value, threshold) => {
    const row = add(table, "tr");
    add(row, "th", name);
    Object.assign(add(add(row, "td"), "meter"), { min: 0, max: 1, value, title: name });
    add(row, "td", value.toFixed(3));
    add(row, "td", threshold === undefined ? "" : `threshold ${threshold.toFixed(3)}`, "soft");
  };
  for (const [name, value] of Object.entries(photo.probabilities)) line(name, value, about.thresholds[name]);
  if (photo.quality !== null) line("quality", photo.quality);
  if (photo.camera) add(facts, "p", photo.camera, "soft");
  results.prepend(card);
}

async function send(file) {
  const body = new FormData();
  body.append("photo", file, file.name);
  const answer = await fetch("v1/screen?pictures=true", { method: "POST", body, headers: headers() });
  if (answer.status === 503) {
    await new Promise((done) => setTimeout(done, 1000));
    return send(file);
  }
  if (!answer.ok) {
    if (answer.status === 401) one("need").hidden = false;
    const reply = await answer.json().catch(() => ({ detail: answer.statusText }));
    throw new Error(`${file.name}: ${reply.detail}`);
  }
  const reply = await answer.json();
  for (const photo of reply.results) show(photo, reply);
}

async function work() {
  if (working) return;
  working = true;
  const faults = [];
  let done = 0;
  // Send one file at a time, so that results appear in the order of the files.
  while (waiting.length) {
    say(`${done} done, ${waiting.length} remaining …`);
    const file = waiting[0];
    try { await send(file); done += 1; waiting.shift(); } catch (fault) {
      if (!one("need").hidden && !token) { say("This server requires a token.", true); working = false; return; }
      faults.push(fault.message);
      waiting.shift();
    }
  }
  say(faults.length ? faults.join("; ") : `${done} done`, faults.length > 0);
  working = false;
}

function take(list) { waiting.push(...list); work(); }

files.addEventListener("change", () => { take(files.files); files.value = ""; });
for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => { event.preventDefault(); take(event.dataTransfer.files); });
one("form").addEventListener("submit", (event) => { event.preventDefault(); token = one("token").value.trim(); one("need").hidden = true; work(); });

fetch("healthz").then((answer) => answer.json()).then((reply) => {
  one("about").textContent = `version ${reply.version} · engine ${reply.backend} ${reply.precision} · bundle ${reply.bundle.slice(0, 12)}`;
}).catch(() => say("The server does not respond.", true));
