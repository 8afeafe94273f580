// The page: photos in, captions out. It knows the service only by its HTTP interface, and asks nothing but its own origin.

const PREDICT = new URL("predict", document.baseURI);
const AT_ONCE = 2; // requests in flight
const PATIENCE = 5; // how often a request waits when the service says that there are too many
const SURE = 0.6; // a word of this probability is not tinted

const WHAT_WENT_WRONG = {
  InvalidImage: "This file cannot be read as a photo",
  MissingImage: "This file is empty",
  ImageTooLarge: "This photo is too large",
  UnsupportedFormat: "This kind of image is not supported",
  InvalidParameter: "These settings do not fit",
  TooManyRequests: "Too many requests at once",
  ServiceUnavailable: "The service is busy or starting",
  Timeout: "The service took too long",
  RequestTimeout: "The photo did not arrive in time",
};

const element = (id) => document.getElementById(id);
const percent = (probability) => `${Math.round(100 * probability)}%`;
const photos = [];

class Photo {
  constructor(file) {
    this.file = file;
    this.state = "waiting";
    this.node = element("photo").content.firstElementChild.cloneNode(true);
    this.preview = URL.createObjectURL(file);
    this.find(".name").textContent = file.name;
    this.find(".remove").setAttribute("aria-label", `Remove ${file.name}`);
    this.find(".remove").addEventListener("click", () => remove(this));
    this.find(".retry").addEventListener("click", () => {
      ask(this);
      this.node.focus();
    });
    this.find(".copy-curl").addEventListener("click", (event) => copy(curl(this), event.currentTarget));
    const image = this.find(".preview");
    image.addEventListener("error", () => image.removeAttribute("src")); // TIFF, in most browsers
    image.src = this.preview;
  }

  find(selector) {
    return this.node.querySelector(selector);
  }

  show(state) {
    this.state = state;
    for (const name of ["waiting", "failed", "done"]) this.find(`.${name}`).hidden = name !== state;
    this.node.setAttribute("aria-busy", String(state === "waiting"));
  }

  showProgress(text, part) {
    this.show("waiting");
    this.find(".progress-text").textContent = text;
    const bar = this.find("progress");
    if (part === undefined) bar.removeAttribute("value");
    else bar.value = part;
  }

  showError(code, message) {
    const title = WHAT_WENT_WRONG[code] ?? "This did not work";
    this.find(".failed-title").textContent = title;
    this.find(".failed-text").textContent = message.charAt(0).toUpperCase() + message.slice(1) + ".";
    this.show("failed");
    say(`${this.file.name}: ${title}.`);
  }

  showResult(result) {
    const { width, height, format } = result.image;
    this.find(".facts").textContent = `${width} × ${height}, ${format}`;
    this.find(".captions").replaceChildren(...result.captions.map((caption) => captionNode(caption, result.model.language)));
    this.find(".none").hidden = result.captions.length > 0;
    this.find(".words").hidden = result.captions.length === 0;
    this.find("code").textContent = curl(this);
    const [best] = result.captions;
    if (best) {
      this.find("tbody").replaceChildren(...words(best).map(wordRow));
      this.find(".preview").alt = sentence(best);
      say(`${this.file.name}: ${sentence(best)} ${percent(best.confidence)} sure.`);
    }
    this.show("done");
  }
}

// The words of a caption with their probabilities: each token between the start and the end token.
function words(caption) {
  const tokens = caption.sentence.map((text, index) => ({ text, probability: Math.exp(caption.token_log_likelihoods[index - 1]) }));
  return tokens.slice(1).filter(({ text }) => !/^<.+>$/.test(text));
}

const separator = (caption) => (words(caption).map(({ text }) => text).join(" ") === caption.caption ? " " : "");

// As alt text: a sentence where the language writes words with spaces between.
function sentence(caption) {
  const text = caption.caption;
  return text && separator(caption) ? `${text.charAt(0).toUpperCase()}${text.slice(1)}.` : text;
}

function captionNode(caption, language) {
  const node = element("caption").content.firstElementChild.cloneNode(true);
  const text = node.querySelector(".sentence");
  text.lang = language;
  words(caption).forEach(({ text: word, probability }, index) => {
    if (index) text.append(separator(caption));
    const span = document.createElement("span");
    span.className = "word";
    span.textContent = word;
    span.title = percent(probability);
    tint(span, probability);
    text.append(span);
  });
  node.querySelector(".percent").textContent = `${percent(caption.confidence)} sure`;
  node.querySelector(".bar > span").style.setProperty("--part", caption.confidence);
  const button = node.querySelector(".copy");
  button.setAttribute("aria-label", `Copy as alt text: ${sentence(caption)}`);
  button.addEventListener("click", () => copy(sentence(caption), button));
  return node;
}

function wordRow({ text, probability }) {
  const row = document.createElement("tr");
  const word = document.createElement("th");
  word.scope = "row";
  word.textContent = text;
  const value = document.createElement("td");
  value.textContent = percent(probability);
  row.append(word, value);
  return row;
}

// Through the style object, which the
// Content-Security-Policy allows, unlike a style attribute.
function tint(span, probability) {
  span.style.setProperty("--doubt", Math.max(0, 1 - probability / SURE).toFixed(3));
}

function parameters() {
  return { beam_size: element("beam_size").value, num_captions: element("num_captions").value };
}

function curl(photo) {
  const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
  const path = photo.file.name.replace(/[\\"]/g, "\\$&");
  const fields = Object.entries(parameters()).map(([name, value]) => `-F ${name}=${value}`);
  return `curl -F ${quoted(`image=@"${path}"`)} ${fields.join(" ")} ${PREDICT}`;
}

// ---- asking the service ----

function ask(photo) {
  photo.request?.abort();
  photo.patience = PATIENCE;
  photo.isAsking = false;
  photo.showProgress("Waiting for the others");
  next();
}

function next() {
  const free = AT_ONCE - photos.filter((photo) => photo.isAsking).length;
  const waiting = photos.filter((photo) => photo.state === "waiting" && !photo.isAsking);
  waiting.slice(0, Math.max(0, free)).forEach(send);
}

function send(photo) {
  const form = new FormData();
  for (const [name, value] of Object.entries(parameters())) form.append(name, value);
  form.append("image", photo.file);
  const request = new XMLHttpRequest(); // fetch does not tell how much of a photo is sent
  photo.request = request;
  photo.isAsking = true;
  photo.showProgress("Sending the photo", 0);
  request.upload.addEventListener("progress", ({ loaded, total }) => photo.showProgress("Sending the photo", loaded / total));
  request.upload.addEventListener("load", () => photo.showProgress("Looking at it"));
  request.addEventListener("load", () => finish(photo, () => answered(photo, request)));
  request.addEventListener("error", () => finish(photo, () => photo.showError("", "there is no connection to the service")));
  request.open("POST", PREDICT);
  request.send(form);
}

function finish(photo, show) {
  photo.request = undefined;
  photo.isAsking = false;
  if (photos.includes(photo)) show();
  next();
}

function answered(photo, request) {
  if (request.status === 429 && photo.patience-- > 0) {
    photo.isAsking = true; // keeps its turn
    photo.showProgress("Waiting for its turn");
    const seconds = Number(request.getResponseHeader("Retry-After")) || 1;
    setTimeout(() => finish(photo, () => photo.showProgress("Waiting for its turn")), 1000 * seconds);
    return;
  }
  try {
    const answer = JSON.parse(request.responseText);
    if (request.status === 200) photo.showResult(answer);
    else photo.showError(answer.error.code, answer.error.message);
  } catch {
    photo.showError("", `the service gave an answer that is not understood (status ${request.status})`);
  }
}

// ---- photos that come and go ----

function add(files) {
  const added = [...files].map((file) => new Photo(file));
  if (!added.length) return;
  photos.unshift(...added);
  element("photos").prepend(...added.map((photo) => photo.node));
  showCount();
  added.forEach(ask);
  element("results").scrollIntoView({ block: "nearest", behavior: calm() ? "auto" : "smooth" });
}

function remove(photo) {
  const place = photos.indexOf(photo);
  photos.splice(place, 1);
  photo.request?.abort();
  URL.revokeObjectURL(photo.preview);
  photo.node.remove();
  showCount();
  (photos[Math.min(place, photos.length - 1)]?.find(".remove") ?? element("choose")).focus();
  say(`${photo.file.name} is removed.`);
  next();
}

function showCount() {
  element("results").hidden = photos.length === 0;
  element("clear").hidden = photos.length < 2;
  document.body.classList.toggle("has-photos", photos.length > 0);
  element("results-title").textContent = photos.length === 1 ? "Your photo" : `Your ${photos.length} photos`;
}

element("choose").addEventListener("click", () => element("files").click());
element("clear").addEventListener("click", () => [...photos].forEach(remove));
for (const input of [element("files"), element("camera-file")]) {
  input.addEventListener("change", () => {
    add(input.files);
    input.value = ""; // so that the same file can be chosen again
  });
}

document.addEventListener("paste", (event) => add(event.clipboardData.files));

let depth = 0; // of elements that a dragged file has entered and not left
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
const dragging = (change) => {
  depth = change === 0 ? 0 : depth + change;
  document.body.classList.toggle("dragging", depth > 0);
};
document.addEventListener("dragenter", (event) => hasFiles(event) && dragging(1));
document.addEventListener("dragleave", (event) => hasFiles(event) && dragging(-1));
document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
document.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  dragging(0);
  add(event.dataTransfer.files);
});

for (const button of document.querySelectorAll("[data-sample]")) {
  button.addEventListener("click", async () => {
    const name = button.dataset.sample;
    const response = await fetch(`samples/${name}`);
    if (response.ok) add([new File([await response.blob()], name, { type: "image/jpeg" })]);
    else say("The sample cannot be read.");
  });
}

// ---- settings ----

function showSettings() {
  const beam = element("beam_size");
  const captions = element("num_captions");
  captions.max = beam.value; // the browser lowers the value with it
  for (const input of [beam, captions]) element(`${input.id}-value`).textContent = input.value;
}

element("settings").addEventListener("input", showSettings);
element("settings").addEventListener("change", () => photos.forEach(ask));
element("settings").addEventListener("submit", (event) => event.preventDefault());

// ---- camera ----

const hasTouch = matchMedia("(pointer: coarse)").matches; // a phone's own camera application is better than ours
const video = element("video");
element("photograph").hidden = !hasTouch && !navigator.mediaDevices?.getUserMedia;

element("photograph").addEventListener("click", async () => {
  if (hasTouch) {
    element("camera-file").click();
    return;
  }
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1920 } } });
    element("camera").showModal();
  } catch (error) {
    const isRefused = error.name === "NotAllowedError";
    complain(isRefused ? "The browser may not use the camera here: allow it, or choose a photo." : "No camera was found: choose a photo instead.");
  }
});

element("shoot").addEventListener("click", () => {
  if (!video.videoWidth) return; // the camera has not shown anything yet
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => {
    element("camera").close();
    add([new File([blob], "photo.jpg", { type: "image/jpeg" })]);
  }, "image/jpeg", 0.92);
});

element("camera-close").addEventListener("click", () => element("camera").close());
element("camera").addEventListener("close", () => {
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
});

// ---- words to the user ----

// To screen readers; one after the other, since a text that is replaced at once is not read.
const toSay = [];
function say(text) {
  toSay.push(text);
  if (toSay.length === 1) speak();
}
function speak() {
  element("status").textContent = toSay[0];
  setTimeout(() => toSay.shift() && toSay.length && speak(), 700);
}

// To everybody.
function complain(text) {
  const note = element("photograph").closest(".drop").querySelector(".small");
  note.textContent = text;
  note.classList.add("complaint");
  say(text);
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without TLS there is no clipboard interface; the old way asks for a selection.
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "unseen";
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const before = button.dataset.text ?? button.textContent;
  button.dataset.text = before;
  button.textContent = "Copied";
  say("Copied.");
  clearTimeout(button.timer);
  button.timer = setTimeout(() => (button.textContent = before), 1800);
}

const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

for (const span of document.querySelectorAll("[data-probability]")) tint(span, Number(span.dataset.probability));
showSettings();
